"""The contract between the engine and a policy: what it sees, what it may say."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from gllm.core.request import Phase, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the hardware and the model allow; the same in the simulator and on GPUs."""

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 1 << 30  # prompt plus output tokens
    max_num_seqs: int = 256  # admitted at once
    depth: int = 1  # pipeline stages
    max_in_flight: int = 0  # micro-batches on the road; 0: as many as `depth`
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_in_flight == 0:
            object.__setattr__(self, "max_in_flight", self.depth)
        if self.max_in_flight < self.depth:
            raise ValueError(
                f"max_in_flight is {self.max_in_flight}; a pipeline of depth {self.depth} needs at least as many"
            )

    @property
    def max_tokens_per_sequence(self) -> int:
        """No sequence ever grows beyond this: the model's length, or the whole cache."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


class SequenceView(Protocol):
    """A sequence as a policy sees it."""

    @property
    def id(self) -> int:
        """The request's id."""

    @property
    def request(self) -> Request:
        """What the client asked for."""

    @property
    def phase(self) -> Phase:
        """Waiting, prefilling, prefilled or decoding."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, steps on the road included."""

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, steps on the road included."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Prompt tokens (outputs to recompute included) that no plan has covered yet."""


class View(Protocol):
    """The engine's state, read-only. Numbers are plain; iterables walk live queues, never copies."""

    @property
    def now_ns(self) -> int:
        """The time of this turn."""

    @property
    def limits(self) -> Limits:
        """What the hardware and the model allow."""

    @property
    def num_plans(self) -> int:
        """Micro-batches planned so far: a counter to rotate by, where others would draw lots."""

    @property
    def num_in_flight(self) -> int:
        """Micro-batches on the road."""

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no cache."""

    @property
    def num_waiting_tokens(self) -> int:
        """#WP: prompt tokens not yet planned, of waiting and of half-prefilled sequences."""

    @property
    def num_running(self) -> int:
        """Admitted sequences, prefilling or decoding."""

    @property
    def num_prefilling(self) -> int:
        """Admitted sequences with prompt left to plan."""

    @property
    def num_decoding(self) -> int:
        """#RD: sequences in their decode phase, ready or on the road; prefills on the road not counted."""

    @property
    def num_ready(self) -> int:
        """Decoding sequences whose next step may be planned now."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks free now, counting those an eviction would free."""

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks that all admitted sequences would hold at their length limits."""

    @property
    def kv_free(self) -> float:
        """KV_free: the idle share of the cache, 0 to 1."""

    @property
    def waiting(self) -> Iterable[SequenceView]:
        """Sequences without cache, in the policy's order."""

    @property
    def prefilling(self) -> Iterable[SequenceView]:
        """Admitted sequences with prompt left to plan, the first admitted first."""

    @property
    def running(self) -> Iterable[SequenceView]:
        """All admitted sequences, the first admitted first."""

    def cached_tokens(self, sequence: SequenceView) -> int:
        """Prompt tokens of a waiting sequence that the prefix cache holds now."""

    def chunk_blocks(self, sequence: SequenceView, num_tokens: int) -> int:
        """Free blocks that planning so many more prompt tokens would use up."""

    def decode_blocks(self, count: int) -> int:
        """Free blocks that the rotation's next `count` steps use up at most."""

    def on_road(self, sequence: SequenceView) -> bool:
        """Whether a plan that holds this sequence has not come back."""

    def limit_blocks(self, sequence: SequenceView) -> int:
        """Blocks the sequence would hold at its length limit."""


class Snapshot(NamedTuple):
    """The view's numbers at one decision, for the log."""

    waiting: int
    waiting_tokens: int
    running: int
    decoding: int
    ready: int
    free_blocks: int
    in_flight: int


class WaitReason(StrEnum):
    """Why no further micro-batch was planned."""

    PIPELINE_FULL = "pipeline full"  # as many micro-batches on the road as allowed
    NO_WORK = "no work"  # no unfinished request
    NOTHING_READY = "nothing ready"  # all that could run is on the road
    CACHE_FULL = "cache full"
    HELD = "held"  # the policy holds work back on purpose


@dataclass(slots=True, init=False)
class Batch:
    """Plan one micro-batch: these chunks, and `num_decode` steps of the rotation or these sequences."""

    prefill: Seq[tuple[SequenceView, int]]  # (sequence, tokens to compute)
    num_decode: int
    decode: Seq[SequenceView]  # name ready sequences instead of counting them

    def __init__(
        self, prefill: Seq[tuple[SequenceView, int]] = (), num_decode: int = 0, decode: Seq[SequenceView] = ()
    ) -> None:
        self.prefill = prefill
        self.num_decode = num_decode
        self.decode = decode


class Preempt(NamedTuple):
    """Take the cache of these admitted sequences, none of them on the road; decide again after."""

    sequences: Seq[SequenceView]


class Wait(NamedTuple):
    """Plan nothing until something happens, or until a time."""

    reason: WaitReason = WaitReason.NOTHING_READY
    until_ns: int | None = None


Decision = Batch | Preempt | Wait


class Order(Protocol):
    """Who is served first among those that wait."""

    def key(self, request: Request) -> tuple[int, ...]:
        """Sort key, smaller first; fixed for the request's life. Ties go by id."""

    def arrange(self, view: View) -> Iterable[SequenceView]:
        """The waiting sequences in the order to try them now; usually `view.waiting`."""


class Policy(Protocol):
    """A scheduling idea: a pure function from a view to a decision."""

    @property
    def order(self) -> Order:
        """Who is admitted first."""

    def decide(self, view: View) -> Decision:
        """The next thing to do. Called again after each batch and preemption until it says wait."""

    def max_batch_tokens(self, limits: Limits) -> int:
        """The most tokens any of its micro-batches holds; shells size their buffers by it."""


class PlanError(Exception):
    """A policy asked for what cannot be; nothing was changed."""


class StallError(Exception):
    """There is work, nothing is on the road, and the policy waits for nothing."""
