"""What the engine hands out (`Plan`, `Turn`) and what a shell hands back (`StepResult`).

Of what is made for every micro-batch, constructors are spelled out: mypyc compiles them, where the ones that
`dataclass` writes stay the interpreter's.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.core.request import NEVER, Sequence

if TYPE_CHECKING:
    from gllm.core.decision import Snapshot, Wait
    from gllm.core.events import Event
    from gllm.core.rotation import DecodeGroup


@dataclass(slots=True, init=False)
class Chunk:
    """Prompt tokens [start, start + num_tokens) of one sequence."""

    sequence: Sequence
    start: int
    num_tokens: int
    final: bool  # completes the prompt, so a token is sampled
    previous: int  # the plan of its last token, if this recomputes after a preemption; else NEVER

    def __init__(self, sequence: Sequence, start: int, num_tokens: int, final: bool, previous: int) -> None:  # noqa: FBT001 - a field
        self.sequence = sequence
        self.start = start
        self.num_tokens = num_tokens
        self.final = final
        self.previous = previous


@dataclass(slots=True)
class Joined:
    """A sequence that steps with this group for the first time."""

    sequence: Sequence
    previous: int  # the plan that produced its last token
    num_output_tokens: int  # before this step


class Plan:
    """One micro-batch on its way. Read-only for shells; the last four fields are the engine's own notes.

    A decode step takes every member of `group`: those of the group's last plan, less `left`, plus
    `joined`. (The group itself may have moved on since, within the same turn.) Fields that
    a plan has no use for stay at the class's defaults: most plans are decode steps of an old group.
    """

    id: int
    chunks: Seq[Chunk] = ()
    num_prefill_tokens: int = 0
    prefill_pairs: int = 0  # query-key pairs under the causal mask
    prefill_context: int = 0  # sum of the chunks' ends: keys and values read
    group: DecodeGroup | None = None
    step: int = 0  # the group's step
    num_decode_tokens: int = 0
    decode_context: int = 0  # sum of the members' lengths
    decode_repeats: int = 0  # of these tokens, those that are in another member's blocks, too: an estimate
    common_context: int = 0  # tokens in blocks that several running sequences have, each once
    joined: Seq[Joined] = ()
    left: Seq[int] = ()  # ids
    grown: Seq[tuple[Sequence, int]] = ()  # (decoding sequence, the block it was given)
    previous: int = NEVER  # the plan in which members other than `joined` took their last step
    num_sampled: int = 0  # rows that pass the head
    num_free_blocks: int = 0  # after this plan's allocations
    num_discarded: int = 0  # tokens of sequences that had stopped already; known when it is back
    preempted: Seq[int] = ()  # ids preempted since the last plan
    saw: Snapshot | None = None  # the view at the decision, when the engine keeps snapshots

    prefilled: Seq[Sequence] = ()  # sequences whose prompt this plan completes
    ending: Seq[Sequence] = ()  # sequences that reach their length limit here
    late: Seq[Sequence] = ()  # ended while on the road: their blocks are freed on return
    released: bool = False  # its sequences can be planned again

    def __init__(self, plan: int) -> None:
        self.id = plan

    @property
    def depends_on(self) -> int:
        """The newest plan whose sampled tokens this one feeds in; NEVER if none."""
        newest = max((joined.previous for joined in self.joined), default=NEVER)
        return max(newest, self.previous) if self.num_decode_tokens > len(self.joined) else newest

    def __repr__(self) -> str:
        return f"Plan({self.id}: {self.num_prefill_tokens} prefill + {self.num_decode_tokens} decode tokens)"


@dataclass(slots=True, init=False)
class Turn:
    """What to do: dispatch `plans` in order, then wait for a result, an arrival or `wait.until_ns`."""

    plans: list[Plan]
    events: list[Event]
    wait: Wait

    def __init__(self, plans: list[Plan], events: list[Event], wait: Wait) -> None:
        self.plans = plans
        self.events = events
        self.wait = wait


@dataclass(slots=True)
class Stopped:
    """A sequence that a result ends: "stop" after the token it just got, "error" at any time.

    `block_hashes` chains over prompt and output, where the shell knows it, make the output reusable.
    """

    id: int
    reason: str = "stop"
    block_hashes: Seq[int] = ()


@dataclass(slots=True, init=False)
class StepResult:
    """A micro-batch that came back; results arrive in the order of plans."""

    plan: int
    stopped: Seq[Stopped]

    def __init__(self, plan: int, stopped: Seq[Stopped] = ()) -> None:
        self.plan = plan
        self.stopped = stopped
