"""Waiting orders: who is admitted first. Any of them goes with any batching policy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.core import Request, SequenceView, View

_NO_DEADLINE_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served."""

    def key(self, request: Request) -> tuple[int, ...]:
        """By arrival."""
        return (request.arrival_ns,)

    def arrange(self, view: View) -> Iterable[SequenceView]:
        """As queued."""
        return view.waiting


@dataclass(frozen=True, slots=True)
class Priority(Fcfs):
    """The smallest priority number first, then arrival (vLLM's `--scheduling-policy priority`)."""

    def key(self, request: Request) -> tuple[int, ...]:
        """By priority, then arrival."""
        return (request.priority, request.arrival_ns)


@dataclass(frozen=True, slots=True)
class ShortestPrompt(Fcfs):
    """Shortest prompt first, then arrival: shortest job first as far as a server can know the job."""

    def key(self, request: Request) -> tuple[int, ...]:
        """By prompt length, then arrival."""
        return (request.num_prompt_tokens, request.arrival_ns)


@dataclass(frozen=True, slots=True)
class EarliestDeadline(Fcfs):
    """The earliest deadline for the first token first; requests without one come last, by arrival."""

    def key(self, request: Request) -> tuple[int, ...]:
        """By deadline, then arrival."""
        deadline = request.deadline_ns
        return (_NO_DEADLINE_NS if deadline is None else deadline, request.arrival_ns)


@dataclass(frozen=True, slots=True)
class LongestPrefix(Fcfs):
    """Longest cached prefix first (SGLang's `lpm`) among the `window` longest-waiting sequences.

    The window bounds the cost of a decision; SGLang falls back to arrival order beyond 128 likewise.
    """

    window: int = 128

    def arrange(self, view: View) -> Iterable[SequenceView]:
        """The head of the queue by cached tokens, then the rest."""
        queue = iter(view.waiting)
        head = sorted(islice(queue, self.window), key=view.cached_tokens, reverse=True)
        yield from head
        yield from queue
