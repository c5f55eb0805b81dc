"""A GPU's clock by hand: rested, settled and in between; the stand-in for exp() beside the real one."""

from itertools import pairwise
from math import exp

import pytest

from gllm.gpu_clock import GpuClock, StageClock

CLOCK = GpuClock(tau_ns=100_000_000, slowdown=0.2, knee=0.5)
MS = 1_000_000


def test_heat_follows_the_rate_beyond_the_knee():
    assert [CLOCK.steady_heat(rate) for rate in (0.0, 0.5, 0.75, 1.0, 1.3)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_rested_step_is_faster():
    # so short that it stays rested, and only its first half is stretched
    assert StageClock(CLOCK).step(0, 12_000, 6000.0, 1.0) == pytest.approx(6000 + 6000 / 1.2, abs=1)
    # of a step as long as tau, rested at first: the mean of 1 - e^-x up to 1 is 1/e
    whole = StageClock(CLOCK).step(0, 100 * MS, 100e6, 1.0)
    assert whole == pytest.approx(100 * MS * (1 + 0.2 * exp(-1)) / 1.2, rel=1e-3)


def test_steps_in_a_row_come_to_what_was_measured_and_stay_there():
    stage = StageClock(CLOCK)
    times = [stage.step(0, 10 * MS, 10e6, 0.7) for _ in range(400)]
    assert all(one <= other for one, other in pairwise(times))
    assert times[0] < 9 * MS
    assert times[300:] == [10 * MS] * 100
    assert stage.heat == pytest.approx(0.7, abs=1e-12)


def test_heat_is_lost_while_there_is_nothing_to_do():
    stage = StageClock(CLOCK)
    stage.heat = 1.0
    assert stage.step(100 * MS, 1000, 0.0, 0.0) == 1000
    assert stage.heat == pytest.approx(exp(-1), rel=0.01)
    before = stage.heat
    assert stage.step(-5 * MS, 0, 0.0, 1.0) == 0, "it was there before the last one had ended"
    assert stage.heat == before
    stage.step(1 << 62, 0, 0.0, 0.0)
    assert stage.heat == pytest.approx(0.0, abs=1e-30)


def test_a_step_after_hotter_ones_takes_longer_than_measured():
    stage = StageClock(CLOCK)
    stage.heat = 1.0
    found = stage.step(0, 1 * MS, 1e6, 0.1)
    assert found == pytest.approx(1 * MS * (1 + 0.2 * (0.1 + 0.9 * exp(-0.005))) / 1.02, rel=1e-5)


@pytest.mark.parametrize("ms", [0, 1, 10, 50, 100, 200, 330, 700])
def test_heat_falls_off_all_but_exponentially(ms):
    stage = StageClock(CLOCK)
    stage.heat = 1.0
    mean = stage.mean(0, ms * MS, 0.0)
    x = ms / 100
    assert stage.heat == pytest.approx(exp(-x), abs=0.0014 if x <= 1 else 0.012)
    assert mean == pytest.approx((1 - exp(-x)) / x if x else 1.0, abs=0.012)
