"""The engine's state. It satisfies `View`: policies read it, only the engine writes it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, cast

from gllm.core.decision import Limits, Snapshot
from gllm.core.kvcache import BlockPool
from gllm.core.request import PREFILLING, WAITING, Sequence
from gllm.core.rotation import Rotation
from gllm.core.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.core.decision import Order, SequenceView
    from gllm.core.plan import Plan


class State:
    """Queues, cache and counters.

    The numbers that a policy reads at every decision are kept, not computed.
    """

    __slots__ = (
        "in_flight",
        "limits",
        "now_ns",
        "num_decoding",
        "num_plans",
        "num_prefilling",
        "num_reserved_blocks",
        "num_running",
        "num_waiting",
        "num_waiting_tokens",
        "pool",
        "prefilling_by_id",
        "queue",
        "rotation",
        "running_by_id",
        "sequences",
    )

    def __init__(self, limits: Limits, order: Order) -> None:
        self.limits = limits
        self.now_ns = 0
        self.sequences: dict[int, Sequence] = {}  # every unfinished one
        self.queue = WaitingQueue(order)
        self.prefilling_by_id: dict[int, Sequence] = {}
        self.running_by_id: dict[int, Sequence] = {}
        self.rotation = Rotation(limits.block_size)
        self.pool = BlockPool(limits.num_blocks, limits.block_size, sharing=limits.prefix_caching)
        self.in_flight: deque[Plan] = deque()
        self.num_plans = 0
        self.num_waiting = 0  # sequences that hold no cache
        self.num_waiting_tokens = 0
        self.num_running = 0  # admitted sequences
        self.num_prefilling = 0  # of the admitted: prompt left to plan
        self.num_decoding = 0
        self.num_reserved_blocks = 0

    @property
    def num_in_flight(self) -> int:
        """Micro-batches on the road."""
        return len(self.in_flight)

    @property
    def num_ready(self) -> int:
        """Decoding sequences whose next step may be planned."""
        return self.rotation.num_ready

    @property
    def num_free_blocks(self) -> int:
        """Blocks free now or by eviction."""
        return self.pool.num_free

    @property
    def kv_free(self) -> float:
        """Idle share of the cache."""
        return self.pool.num_free / self.limits.num_blocks

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Sequences without cache, in order."""
        return self.queue

    @property
    def prefilling(self) -> Iterable[Sequence]:
        """Admitted sequences with prompt left, in order of admission."""
        return self.prefilling_by_id.values()

    @property
    def running(self) -> Iterable[Sequence]:
        """Admitted sequences, in order of admission."""
        return self.running_by_id.values()

    @property
    def oldest_in_flight(self) -> int:
        """Id of the oldest plan on the road, or of the next one."""
        return self.in_flight[0].id if self.in_flight else self.num_plans

    def cached_tokens(self, sequence: SequenceView) -> int:
        """Tokens of a waiting sequence found in the prefix cache."""
        if not sequence.request.block_hashes:
            return 0
        return len(self.find_hits(cast("Sequence", sequence)).hits) * self.limits.block_size

    def find_hits(self, sequence: Sequence) -> Sequence:
        """Bring `sequence.hits` up to date; at least one token is left to compute."""
        pool = self.pool
        if sequence.hits_version != pool.version:
            limit = (sequence.target - 1) // pool.block_size
            sequence.hits = pool.match(sequence.request.block_hashes, limit)
            sequence.num_evictable_hits = pool.count_evictable(sequence.hits)
            sequence.hits_version = pool.version
        return sequence

    def chunk_blocks(self, sequence: SequenceView, num_tokens: int) -> int:
        """Free blocks that `num_tokens` more prompt tokens use up."""
        known: Sequence = sequence  # type: ignore[assignment]  # policies hold our own sequences
        size = self.pool.block_size
        if known.phase is not WAITING:
            return -(-(known.num_computed_tokens + num_tokens) // size) - len(known.blocks)
        if not known.request.block_hashes:
            return -(-num_tokens // size)
        self.find_hits(known)
        return -(-num_tokens // size) + known.num_evictable_hits

    def decode_blocks(self, count: int) -> int:
        """Free blocks that the next `count` decode steps use up at most."""
        return self.rotation.count_blocks(count)

    def on_road(self, sequence: SequenceView) -> bool:
        """Whether a plan with this sequence is on the road."""
        return cast("Sequence", sequence).newest_plan() >= self.oldest_in_flight

    def token_plans(self, sequence: Sequence) -> list[Plan]:
        """Plans on the road that sample a token for this sequence: two at most."""
        newest, oldest = sequence.newest_plan(), self.oldest_in_flight
        if newest < oldest or sequence.phase in (WAITING, PREFILLING):
            return []
        plan = self.in_flight[newest - oldest]
        if any(chunk.sequence is sequence for chunk in plan.chunks):
            return [plan]
        joined = (entry.previous for entry in plan.joined if entry.sequence is sequence)
        previous = next(joined, plan.previous)
        return [plan] if previous < oldest else [plan, self.in_flight[previous - oldest]]

    def limit_blocks(self, sequence: SequenceView) -> int:
        """Blocks held at the length limit."""
        return -(-cast("Sequence", sequence).limit // self.limits.block_size)

    def snapshot(self) -> Snapshot:
        """The numbers a policy sees."""
        return Snapshot(
            waiting=self.num_waiting,
            waiting_tokens=self.num_waiting_tokens,
            running=self.num_running,
            decoding=self.num_decoding,
            ready=self.num_ready,
            free_blocks=self.num_free_blocks,
            in_flight=self.num_in_flight,
        )
