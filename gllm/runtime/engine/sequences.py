"""What the core does not know of its sequences: their tokens, their slots on the workers, when they stop.

`Sequences` turns the core's plans into the workers' steps, and their tokens into what stops and what is told.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gllm.core import Stopped
from gllm.runtime.engine.hashing import extend_hashes
from gllm.runtime.messages import Admission, ChunkWork, Step, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.core import DecodeGroup, Limits, Plan, Request
    from gllm.runtime.messages import NewRequest, StepDone
    from gllm.runtime.outputs import Logprobs

_MEMBERS = -1
"""Where a decode group's notes hold its members' list."""


@dataclass(slots=True, eq=False)
class Live:
    """A sequence that has not ended."""

    id: int  # the core's
    asked: NewRequest
    stop_token_ids: frozenset[int]
    limit: int  # prompt and output, as the core will enforce it
    token_ids: list[int]  # prompt and outputs known so far
    hashes: list[int]
    slot: int = -1  # on the workers; -1: none
    num_sent_blocks: int = 0  # of its table, known to the workers
    num_cached_tokens: int = 0  # of the prompt, at the first admission
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of its tokens but the first, so far
    stop_token_id: int | None = None  # the one that ended it
    stopped: bool = False  # its last token is known

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.asked.prompt_token_ids)


@dataclass(slots=True)
class Flight:
    """A step on the road: whose tokens come back, in the order of its sampled rows."""

    plan: Plan
    rows: list[Live]
    chunks: list[Live]  # of all chunks, final or not
    dispatched_ns: int
    queue: tuple[int, int]  # sequences (waiting, running) right after


class Sequences:
    """All live sequences, and the slots they hold."""

    def __init__(self, limits: Limits, eos_token_ids: Iterable[int]) -> None:
        self._block_size, self._shares = limits.block_size, limits.prefix_caching
        self._max_tokens = limits.max_tokens_per_sequence
        self._eos = frozenset(eos_token_ids)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self.by_id: dict[int, Live] = {}
        self.id_of: dict[int, int] = {}  # front end's key -> the core's id

    def add(self, asked: NewRequest, request: Request, hashes: list[int]) -> Live:
        """Take in a request that the core is about to see."""
        params = asked.params
        stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos)
        longest = self._max_tokens
        limit = min(longest, request.num_prompt_tokens + (request.max_tokens or longest))
        live = Live(request.id, asked, stops, limit, list(asked.prompt_token_ids), hashes)
        self.by_id[request.id] = live
        self.id_of[asked.key] = request.id
        return live

    def remove(self, request_id: int) -> Live:
        """Forget a sequence that ended; later steps may use its slot: every stage computes in the order of plans."""
        live = self.by_id.pop(request_id)
        del self.id_of[live.asked.key]
        self.vacate(live)
        live.stopped = True  # tokens that are still on the road are nobody's
        return live

    def vacate(self, live: Live) -> None:
        """Give back the slot of a sequence that lost its cache."""
        if live.slot >= 0:
            self._free_slots.append(live.slot)
        live.slot = -1
        live.num_sent_blocks = 0
        live.prompt_logprobs = []  # to be computed again

    def step(self, plan: Plan) -> tuple[Step, list[Live], list[Live]]:
        """What the workers need to know of a plan; who its sampled rows and its chunks belong to."""
        admissions: list[Admission] = []
        # Before any member is looked up: who joins was admitted by an earlier plan.
        members, slots = self._members(plan.group, plan) if plan.group is not None else ([], b"")
        grown = [self._grow(sequence.id, block) for sequence, block in plan.grown]
        chunks, owners, rows = [], [], list(members)
        for chunk in plan.chunks:
            live = self.by_id[chunk.sequence.id]
            if live.slot < 0:
                admissions.append(self._admit(live))
            end = chunk.start + chunk.num_tokens
            blocks = chunk.sequence.blocks[live.num_sent_blocks : -(-end // self._block_size)]
            live.num_sent_blocks += len(blocks)
            chunks.append(ChunkWork(live.slot, chunk.start, chunk.num_tokens, chunk.final, blocks))
            owners.append(live)
            if chunk.final:
                rows.append(live)
        step = Step(plan.id, admissions, chunks, len(members), slots, grown, plan.depends_on)
        return step, rows, owners

    def _members(self, group: DecodeGroup, plan: Plan) -> tuple[list[Live], bytes]:
        """A group's members as of this plan, and their slots packed; made anew only when somebody came or went."""
        members: list[Live]
        members, slots = group.notes.get(_MEMBERS, ([], b""))
        if plan.left or plan.joined:
            left = set(plan.left)
            members = [live for live in members if live.id not in left]
            members += [self.by_id[entry.sequence.id] for entry in plan.joined]
            slots = array("i", [live.slot for live in members]).tobytes()
            group.notes[_MEMBERS] = members, slots
        assert len(members) == plan.num_decode_tokens
        return members, slots

    def _grow(self, request_id: int, block: int) -> tuple[int, int]:
        live = self.by_id[request_id]
        live.num_sent_blocks += 1
        return live.slot, block

    def _admit(self, live: Live) -> Admission:
        live.slot = self._free_slots.pop()
        asked = live.asked
        return Admission(
            slot=live.slot,
            token_ids=live.token_ids,
            num_prompt_tokens=len(asked.prompt_token_ids),
            params=asked.params,
            seed=asked.seed,
            stop_token_ids=sorted(live.stop_token_ids),
        )

    def take(self, flight: Flight, done: StepDone) -> tuple[list[Stopped], list[TokenDelta]]:
        """A step's tokens: who stops with them, and what there is to tell."""
        stopped: list[Stopped] = []
        deltas: list[TokenDelta] = []
        logprobs = done.logprobs
        for number, entries in done.prompt_logprobs or ():
            flight.chunks[number].prompt_logprobs += entries
        for row, (live, token) in enumerate(zip(flight.rows, array("i", done.token_ids), strict=True)):
            if live.stopped:  # planned ahead of its end, or aborted on the road
                continue
            live.token_ids.append(token)
            entry = logprobs[row] if logprobs is not None else None
            delta = TokenDelta(live.asked.key, [token], logprobs=None if entry is None else [entry])
            if live.num_output_tokens == 1:
                delta.num_cached_tokens = live.num_cached_tokens
                if live.asked.params.prompt_logprobs is not None:
                    delta.prompt_logprobs = [None, *live.prompt_logprobs]
            deltas.append(delta)
            if self._stops(live, token):
                live.stopped = True
                live.stop_token_id = token if token in (live.asked.params.stop_token_ids or ()) else None
                stopped.append(Stopped(live.id, block_hashes=self._final_hashes(live)))
        return stopped, deltas

    def _stops(self, live: Live, token: int) -> bool:
        """Whether a token ends its answer; that it is the last one allowed is for the engine to see."""
        length = live.asked.num_output_tokens
        if length is None:
            return token in live.stop_token_ids
        return live.num_output_tokens >= length and len(live.token_ids) < live.limit

    def _final_hashes(self, live: Live) -> list[int]:
        """Of prompt and answer, so that the next turn of a conversation finds them; none where a trace gave its own."""
        asked = live.asked
        if not self._shares or asked.block_hashes is not None or asked.params.prompt_logprobs is not None:
            return []
        return extend_hashes(live.hashes, live.token_ids, self._block_size)
