"""What happened to requests during a turn, in order."""

from __future__ import annotations

from typing import NamedTuple


class Scheduled(NamedTuple):
    """First admitted; so many prompt tokens were found in the prefix cache."""

    id: int
    num_cached_tokens: int


class FirstToken(NamedTuple):
    """The first output token is known."""

    id: int


class Preempted(NamedTuple):
    """Lost its cache; will be recomputed. No token is lost."""

    id: int


class Finished(NamedTuple):
    """Ended with "stop", "length", "abort" or "error" after so many output tokens."""

    id: int
    reason: str
    num_output_tokens: int


class Rejected(NamedTuple):
    """Can never be served; `reason` says why and how to mend it."""

    id: int
    reason: str


Event = Scheduled | FirstToken | Preempted | Finished | Rejected
