"""A GPU's clock by hand: rested, hot and in between; the stand-in for exp() beside the real one."""

from itertools import pairwise
from math import exp

import pytest

from gllm.gpu_clock import GpuClock, StageClock

CLOCK = GpuClock(tau_ns=50_000_000, slowdown=0.2, knee=0.5, attention=0.5)
MS = 1_000_000


def test_heat_follows_the_average_beyond_the_knee():
    assert [CLOCK.heat(power) for power in (0.0, 0.5, 0.75, 1.0, 1.3)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_rested_step_takes_its_time_and_a_long_one_heats_itself():
    assert StageClock(CLOCK).step(0, 5 * MS, 5e6, 1.0) == 5 * MS
    # twice tau long: the mean of 1 - e^-x up to 2 is (1 + e^-2) / 2, of which the knee leaves e^-2 as heat
    found = StageClock(CLOCK).step(0, 100 * MS, 60e6, 1.0)
    assert found == pytest.approx(100 * MS + 60 * MS * 0.2 * exp(-2), rel=2e-3)


def test_steps_in_a_row_come_to_full_heat_and_stay_there():
    stage = StageClock(CLOCK)
    times = [stage.step(0, 10 * MS, 8e6, 1.0) for _ in range(200)]
    assert times[:3] == [10 * MS] * 3, "the clock waits for the average to pass the knee"
    assert all(one <= other for one, other in pairwise(times))
    assert times[150:] == [pytest.approx(10 * MS + 8 * MS * 0.2, abs=2)] * 50
    assert stage.power == pytest.approx(1.0, abs=1e-9)


def test_little_power_never_heats():
    stage = StageClock(CLOCK)
    assert {stage.step(0, 10 * MS, 10e6, 0.5) for _ in range(200)} == {10 * MS}


def test_power_is_forgotten_while_there_is_nothing_to_do():
    stage = StageClock(CLOCK)
    stage.power = 1.0
    assert stage.step(50 * MS, 1000, 0.0, 0.0) == 1000
    assert stage.power == pytest.approx(exp(-1), rel=0.01)
    before = stage.power
    assert stage.step(-5 * MS, 0, 0.0, 1.0) == 0, "it was there before the last one had ended"
    assert stage.power == before
    stage.step(1 << 62, 0, 0.0, 0.0)
    assert stage.power == pytest.approx(0.0, abs=1e-30)


def test_a_step_after_hotter_ones_takes_longer():
    stage = StageClock(CLOCK)
    stage.power = 1.0
    found = stage.step(0, 1 * MS, 1e6, 0.1)
    mean = 0.1 + 0.9 * (1 - exp(-0.02)) / 0.02
    assert found == pytest.approx(1 * MS * (1 + 0.2 * (mean - 0.5) / 0.5), rel=1e-5)


@pytest.mark.parametrize("ms", [0, 1, 5, 25, 50, 100, 165, 350])
def test_power_falls_off_all_but_exponentially(ms):
    stage = StageClock(CLOCK)
    stage.power = 1.0
    mean = stage.mean(0, ms * MS, 0.0)
    x = ms / 50
    assert stage.power == pytest.approx(exp(-x), abs=0.0014 if x <= 1 else 0.012)
    assert mean == pytest.approx((1 - exp(-x)) / x if x else 1.0, abs=0.012)
