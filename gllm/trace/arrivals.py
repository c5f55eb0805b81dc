"""Arrival times drawn for traces that have none, or in place of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from gllm.trace.errors import TraceError
from gllm.trace.fields import NS_PER_S

_EXAMPLES = "poisson:10, gamma:10:2.5 or burst"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """A renewal process: gamma gaps of mean `1 / rate_per_s` and of variation `cv`.

    `cv` is the gaps' standard deviation over their mean: 1 is Poisson, more is burstier. An
    infinite rate puts every arrival at 0.
    """

    rate_per_s: float
    cv: float = 1.0

    def times(self, count: int, seed: int) -> list[int]:
        """`count` arrival times in ns, ascending from 0, the same for the same seed."""
        rng = Random(seed)
        shape = self.cv**-2
        gaps = (rng.gammavariate(shape, 1 / shape) / self.rate_per_s for _ in range(count - 1))
        return [round(time_s * NS_PER_S) for time_s in accumulate(gaps, initial=0.0)]


def parse_arrivals(text: str) -> Arrivals:
    """`poisson:RATE`, `gamma:RATE:CV` (RATE in requests/s) or `burst`, all at once."""
    match text.split(":"):
        case ["burst"]:
            return Arrivals(rate_per_s=math.inf)
        case ["poisson", rate]:
            return Arrivals(rate_per_s=_between("rate", rate, 1e-6, 1e9))
        case ["gamma", rate, cv]:
            return Arrivals(rate_per_s=_between("rate", rate, 1e-6, 1e9), cv=_between("CV", cv, 0.01, 100))
    raise TraceError(f"arrivals {text!r} are unknown; write {_EXAMPLES}")


def _between(name: str, text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if low <= number <= high:
        return number
    raise TraceError(f"arrivals: the {name} is {text!r}; it must be a number from {low:g} to {high:g} ({_EXAMPLES})")
