"""What a client asks for (`Request`) and how far the engine has come with it (`Sequence`)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gllm.core.rotation import DecodeGroup

NEVER: Final = -1
"""The plan id that means "no plan yet"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the core sees it: lengths and hashes, never token values.

    `block_hashes` are chained: equal hashes mean equal blocks after equal prefixes, one for each
    full block of the prompt. `max_tokens` is the most output the client allows (None: up to the
    model's length); the true length is the shell's secret.
    """

    id: int
    num_prompt_tokens: int
    arrival_ns: int
    max_tokens: int | None = None
    priority: int = 0  # smaller is more urgent
    deadline_ns: int | None = None  # for the first token
    block_hashes: Seq[int] = ()

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1:
            raise ValueError(f"request {self.id}: the prompt is empty; it needs at least one token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"request {self.id}: max_tokens is {self.max_tokens}; it must be at least 1")


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # holds no cache; never admitted, or preempted
    PREFILLING = "prefilling"  # admitted; part of its prompt is not planned yet
    PREFILLED = "prefilled"  # its last chunk is on the road, the next token not yet plannable
    DECODING = "decoding"
    FINISHED = "finished"


# Looking a member up on its enum costs more than the comparison it is for; the core does it for every chunk.
WAITING: Final = Phase.WAITING
PREFILLING: Final = Phase.PREFILLING
PREFILLED: Final = Phase.PREFILLED
DECODING: Final = Phase.DECODING
FINISHED: Final = Phase.FINISHED


class Sequence:
    """A request's progress. The engine writes it; policies and shells only read.

    Token counts include steps that are planned but not yet back. While the sequence decodes, its
    count is its group's step plus a constant, so a group that goes on touches no member.
    """

    __slots__ = (
        "_tokens",
        "admitted",
        "blocks",
        "group",
        "hits",
        "hits_version",
        "id",
        "join_step",
        "last_plan",
        "last_token_plan",
        "limit",
        "num_computed_tokens",
        "num_evictable_hits",
        "num_hashed",
        "num_uncomputed_tokens",
        "offset",
        "phase",
        "request",
        "target",
    )

    def __init__(self, request: Request, limit: int) -> None:
        self.id = request.id
        self.request = request
        self.limit = limit  # prompt plus output never exceed this many tokens
        self.phase = WAITING
        self.admitted = False  # at least once
        self.target = request.num_prompt_tokens  # tokens to prefill: after a preemption, outputs too
        self.num_computed_tokens = 0  # of `target`: cached or planned
        self.num_uncomputed_tokens = self.target  # of `target`: no plan has covered them yet
        self.blocks: list[int] = []
        self.num_hashed = 0  # leading blocks that were looked at for sharing
        self.hits: Seq[int] = ()  # cached blocks of the prompt, as of pool version `hits_version`
        self.num_evictable_hits = 0
        self.hits_version = NEVER
        self.group: DecodeGroup | None = None
        self.join_step = 0
        self.offset = 0
        self.last_plan = NEVER  # newest plan that held a chunk, or a step before joining `group`
        self.last_token_plan = NEVER  # the plan of the last token before a preemption
        self._tokens = self.target

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the client's prompt."""
        return self.request.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, steps on the road included."""
        return self._tokens if self.group is None else self.offset + self.group.step

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, steps on the road included."""
        return self.num_tokens - self.request.num_prompt_tokens

    def newest_plan(self) -> int:
        """The newest plan this sequence takes part in, `NEVER` if none."""
        group = self.group
        return self.last_plan if group is None or group.step == self.join_step else group.last_plan

    def settle(self, num_tokens: int) -> None:
        """Store the token count of a sequence that is in no group."""
        self.group = None
        self._tokens = num_tokens

    def restart(self) -> None:
        """Back to waiting: outputs so far join the prompt, so that recomputing loses no token."""
        if self.phase is DECODING:
            self.last_token_plan = self.last_plan
        self.target = self.num_tokens
        self.phase = WAITING
        self.num_computed_tokens = self.num_hashed = 0
        self.num_uncomputed_tokens = self.target

    def __repr__(self) -> str:
        return f"Sequence({self.id}, {self.phase.value}, {self.num_tokens} tokens)"
