"""How a GPU's clock follows what it computes: it lowers some 50 ms after arithmetic began, and rises as long after it.

A GPU draws more power in large steps than it may for long. Each stage has an average p of what its steps draw, over the
last `tau_ns` or so:

    dp/dt = (power - p) / tau          power: of the step that is computed, 0 between steps
    heat  = (p - knee) / (1 - knee)    within 0 and 1

What a step's `power` is, from 0 to 1, says who knows the step: 1 for matrix products at their best rate, less for fewer
rows, `attention` while the keys of decodes are read. Of a step that part which arithmetic and latency bound takes
longer by `slowdown * heat`, with the mean of p over the step; what is bound by memory does not.

Both shells have it from here: the profiler fits the constants, the simulator keeps each stage's average. There is no
exp() in it, whose last bit differs between machines: e^-x is the inverse of the first terms of e^x, off by 0.0014
at most up to x = 1, and by 0.012 anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClock:
    """What a profile says of it."""

    tau_ns: int  # in which the average goes 63 % of its way
    slowdown: float  # at full heat what the clock stretches takes so much longer, as a share
    knee: float  # averages up to here leave the clock where it is
    attention: float  # power of reading the keys of decodes

    def heat(self, power: float) -> float:
        """Of an average of power."""
        heat = (power - self.knee) / (1.0 - self.knee)
        return 0.0 if heat < 0.0 else min(heat, 1.0)


class StageClock:
    """One stage's average of power, as of the end of its last step; at first it is rested."""

    def __init__(self, clock: GpuClock) -> None:
        self._clock, self._rate_ns = clock, 1.0 / clock.tau_ns
        self.power = 0.0

    def step(self, idle_ns: int, rested_ns: int, stretched_ns: float, power: float) -> int:
        """How long a step takes, and keep the average that it leaves.

        Args:
            idle_ns: the stage had nothing to do since its last step.
            rested_ns: it takes after a rest.
            stretched_ns: what the clock stretches of these.
            power: that it draws.
        """
        clock = self._clock
        heat = clock.heat(self.mean(idle_ns, rested_ns, power))
        return rested_ns + int(stretched_ns * (clock.slowdown * heat))

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
