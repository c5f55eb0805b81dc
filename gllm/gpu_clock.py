"""How a GPU's clock follows what it computes: it lowers within some 100 ms of arithmetic, and rises again after.

A GPU draws more power in large steps than it may for long. Each stage has a heat h from 0 to 1, an exponential average
over `tau_ns` of the heat u that its steps would settle at:

    dh/dt = (u - h) / tau        u = (rate - knee) / (1 - knee), within 0 and 1; 0 between steps

`rate` is a step's tokens by the time of its layers, as a share of the most that a step of the profile reaches. What
the clock stretches of a step, the part that was measured settled, at h = u, takes

    settled * (1 + slowdown * h) / (1 + slowdown * u)        h: the mean over the step

Both shells have it from here: the profiler fits the constants, the simulator keeps each stage's heat. There is no
exp() in it, whose last bit differs between machines: e^-x is the inverse of the first terms of e^x, off by 0.0014
at most up to x = 1, and by 0.012 anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClock:
    """What a profile says of it."""

    tau_ns: int  # in which heat goes 63 % of its way
    slowdown: float  # at full heat a step takes so much more than rested, as a share
    knee: float  # rates up to here leave the clock where it is

    def steady_heat(self, rate: float) -> float:
        """Where steps of that rate settle."""
        heat = (rate - self.knee) / (1.0 - self.knee)
        return 0.0 if heat < 0.0 else min(heat, 1.0)

    def factor(self, heat: float, steady: float) -> float:
        """How long at a heat takes what was measured at a steady one, as a multiple."""
        return (1.0 + self.slowdown * heat) / (1.0 + self.slowdown * steady)


class StageClock:
    """One stage's heat, as of the end of its last step; at first it is rested."""

    def __init__(self, clock: GpuClock) -> None:
        self._clock, self._rate_ns = clock, 1.0 / clock.tau_ns
        self.heat = 0.0

    def step(self, idle_ns: int, settled_ns: int, stretched_ns: float, steady: float) -> int:
        """How long a step takes, and keep the heat that it leaves.

        Args:
            idle_ns: the stage had nothing to do since its last step. What lies between any two steps in a row is none
                of it: that is in the times that were measured so.
            settled_ns: it takes in a row with its like.
            stretched_ns: what the clock stretches of these.
            steady: the heat that it would settle at.
        """
        heat = self.mean(idle_ns, settled_ns, steady)
        return settled_ns + int(stretched_ns * (self._clock.factor(heat, steady) - 1.0))

    def mean(self, idle_ns: int, settled_ns: int, steady: float) -> float:
        """The heat of a step, and keep what it leaves; as for `step`."""
        heat = self.heat
        if idle_ns > 0:
            heat /= _way(idle_ns * self._rate_ns)[1]
        # As if it took its settled time: what that is off by shifts the mean by less than the constants are known.
        way, growth = _way(settled_ns * self._rate_ns)
        above = heat - steady
        self.heat = steady + above / growth
        return steady + above * way / growth


def _way(x: float) -> tuple[float, float]:
    """(e^x - 1) / x and e^x, the latter to its fourth power; the former by the latter is the mean of e^-t up to x."""
    way = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0))
    return way, 1.0 + x * way
