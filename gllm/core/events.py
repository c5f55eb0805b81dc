"""What happened to requests during a turn, in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Scheduled:
    """First admitted; so many prompt tokens were found in the prefix cache."""

    id: int
    num_cached_tokens: int


@dataclass(slots=True)
class FirstToken:
    """The first output token is known."""

    id: int


@dataclass(slots=True)
class Preempted:
    """Lost its cache; will be recomputed. No token is lost."""

    id: int


@dataclass(slots=True)
class Finished:
    """Ended with "stop", "length", "abort" or "error" after so many output tokens."""

    id: int
    reason: str
    num_output_tokens: int


@dataclass(slots=True)
class Rejected:
    """Can never be served; `reason` says why and how to mend it."""

    id: int
    reason: str


Event = Scheduled | FirstToken | Preempted | Finished | Rejected
