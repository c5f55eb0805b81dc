"""How a GPU's clock follows what it computes: it lowers some 50 ms after arithmetic began, and rises as long after it.

A GPU draws more power in large steps than it may for long. What it may has limits, each of an average p over the last
`tau_ns` or so; an H200 has one over some 40 ms and a closer one over most of a second:

    dp/dt = (power - p) / tau          power: of the step that is computed, 0 between steps
    heat  = (p - knee) / (1 - knee)    within 0 and 1

What a step's `power` is, from 0 to 1, says who knows the step: that of its tokens (`base_power`), `prefill` while its
chunks attend, `attention` while the keys of decodes are read. Of a step that part which arithmetic and latency bound
takes longer by the sum of all limits' `slowdown * heat`, with the mean of p over the step; what is bound by memory does
not.

Both shells have it from here: the profiler fits the constants, the simulator keeps each stage's averages. There is no
exp() in it, whose last bit differs between machines: e^-x is the inverse of the first terms of e^x, off by 0.0014
at most up to x = 1, and by 0.012 anywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLimit:
    """Of an average of power."""

    tau_ns: int  # in which the average goes 63 % of its way
    slowdown: float  # at full heat what the clock stretches takes so much longer, as a share
    knee: float  # averages up to here leave the clock where it is

    def heat(self, power: float) -> float:
        """Of an average of power."""
        heat = (power - self.knee) / (1.0 - self.knee)
        return 0.0 if heat < 0.0 else min(heat, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClock:
    """What a profile says of it."""

    limits: tuple[PowerLimit, ...]
    attention: float  # power of reading the keys of decodes
    prefill: float = 1.0  # of the attention of chunks
    tokens: tuple[int, ...] = ()  # sizes of steps, increasing
    power: tuple[float, ...] = ()  # of each such size, if its tokens had the best rate of all
    decode: float | None = None  # of decodes alone, if they had that rate; None: as sizes have it

    def base_power(self, num_tokens: int, rate: float, *, has_chunks: bool) -> float:
        """Of what depends on the number of tokens alone.

        Args:
            num_tokens: those of padding too that costs what they do.
            rate: at which they are computed, as a share of the best one that any size has.
            has_chunks: or is of decodes alone.
        """
        at_best_rate = self._at_best_rate(num_tokens) if has_chunks or self.decode is None else self.decode
        return min(1.0, rate * at_best_rate)

    def _at_best_rate(self, num_tokens: int) -> float:
        """Between sizes in a straight line, beyond them as at the nearest one."""
        sizes, power = self.tokens, self.power
        if not sizes:
            return 1.0
        at = bisect_right(sizes, num_tokens)
        if at in {0, len(sizes)}:
            return power[min(at, len(sizes) - 1)]
        low, high = sizes[at - 1], sizes[at]
        return power[at - 1] + (power[at] - power[at - 1]) * ((num_tokens - low) / (high - low))


class StageClock:
    """One stage's averages of power, as of the end of its last step; at first it is rested."""

    def __init__(self, clock: GpuClock) -> None:
        self.averages = [PowerAverage(limit) for limit in clock.limits]

    def step(self, idle_ns: int, rested_ns: int, stretched_ns: float, power: float) -> int:
        """How long a step takes, and keep the averages that it leaves.

        Args:
            idle_ns: the stage had nothing to do since its last step.
            rested_ns: it takes after a rest.
            stretched_ns: what the clock stretches of these.
            power: that it draws.
        """
        return rested_ns + int(stretched_ns * self.slowdown(idle_ns, rested_ns, power))

    def slowdown(self, idle_ns: int, for_ns: int, power: float) -> float:
        """By what share a step takes longer, and keep the averages that it leaves."""
        found = 0.0
        for average in self.averages:
            limit = average.limit
            found += limit.slowdown * limit.heat(average.mean(idle_ns, for_ns, power))
        return found


class PowerAverage:
    """That of one limit; `power` is what the last step left."""

    def __init__(self, limit: PowerLimit) -> None:
        self.limit, self._rate_ns = limit, 1.0 / limit.tau_ns
        self.power = 0.0

    def mean(self, idle_ns: int, for_ns: int, power: float) -> float:
        """The mean of the average over a step, and keep what it leaves."""
        before = self.power
        if idle_ns > 0:
            before /= _way(idle_ns * self._rate_ns)[1]
        # As if it took its rested time: what that is off by shifts the mean by less than the constants are known.
        way, growth = _way(for_ns * self._rate_ns)
        above = before - power
        self.power = power + above / growth
        return power + above * way / growth


def _way(x: float) -> tuple[float, float]:
    """(e^x - 1) / x and e^x, the latter to its fourth power; the former by the latter is the mean of e^-t up to x."""
    way = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0))
    return way, 1.0 + x * way
