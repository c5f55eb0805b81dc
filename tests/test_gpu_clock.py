"""A GPU's clock by hand: rested, hot and in between; the stand-in for exp() beside the real one."""

from dataclasses import replace
from itertools import pairwise
from math import exp

import pytest

from gllm.gpu_clock import GpuClock, PowerAverage, PowerLimit, StageClock

LIMIT = PowerLimit(tau_ns=50_000_000, slowdown=0.2, knee=0.5)
SLOW = PowerLimit(tau_ns=500_000_000, slowdown=0.05, knee=0.5)
CLOCK = GpuClock(limits=(LIMIT,), attention=0.5)
MS = 1_000_000


def test_heat_follows_the_average_beyond_the_knee():
    assert [LIMIT.heat(power) for power in (0.0, 0.5, 0.75, 1.0, 1.3)] == [0.0, 0.0, 0.5, 1.0, 1.0]


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
    assert stage.averages[0].power == pytest.approx(1.0, abs=1e-9)


def test_little_power_never_heats():
    stage = StageClock(CLOCK)
    assert {stage.step(0, 10 * MS, 10e6, 0.5) for _ in range(200)} == {10 * MS}


def test_power_is_forgotten_while_there_is_nothing_to_do():
    stage = StageClock(CLOCK)
    stage.averages[0].power = 1.0
    assert stage.step(50 * MS, 1000, 0.0, 0.0) == 1000
    assert stage.averages[0].power == pytest.approx(exp(-1), rel=0.01)
    before = stage.averages[0].power
    assert stage.step(-5 * MS, 0, 0.0, 1.0) == 0, "it was there before the last one had ended"
    assert stage.averages[0].power == before
    stage.step(1 << 62, 0, 0.0, 0.0)
    assert stage.averages[0].power == pytest.approx(0.0, abs=1e-30)


def test_a_step_after_hotter_ones_takes_longer():
    stage = StageClock(CLOCK)
    stage.averages[0].power = 1.0
    found = stage.step(0, 1 * MS, 1e6, 0.1)
    mean = 0.1 + 0.9 * (1 - exp(-0.02)) / 0.02
    assert found == pytest.approx(1 * MS * (1 + 0.2 * (mean - 0.5) / 0.5), rel=1e-5)


@pytest.mark.parametrize("ms", [0, 1, 5, 25, 50, 100, 165, 350])
def test_power_falls_off_all_but_exponentially(ms):
    average = PowerAverage(LIMIT)
    average.power = 1.0
    mean = average.mean(0, ms * MS, 0.0)
    x = ms / 50
    assert average.power == pytest.approx(exp(-x), abs=0.0014 if x <= 1 else 0.012)
    assert mean == pytest.approx((1 - exp(-x)) / x if x else 1.0, abs=0.012)


def test_limits_add_up():
    both = StageClock(GpuClock(limits=(LIMIT, SLOW), attention=0.5))
    alone = [StageClock(GpuClock(limits=(limit,), attention=0.5)) for limit in (LIMIT, SLOW)]
    for number in range(200):
        idle_ns, power = (40 * MS, 0.3) if number % 9 == 8 else (0, 1.0)
        found = both.step(idle_ns, 10 * MS, 8e6, power) - 10 * MS
        assert found == pytest.approx(sum(each.step(idle_ns, 10 * MS, 8e6, power) - 10 * MS for each in alone), abs=2)
    assert found > 0
    assert StageClock(GpuClock(limits=(), attention=0.5)).step(0, 10 * MS, 8e6, 1.0) == 10 * MS


def test_a_slow_limit_comes_late():
    stage = StageClock(GpuClock(limits=(LIMIT, SLOW), attention=0.5))
    times = [stage.step(0, 10 * MS, 10e6, 1.0) for _ in range(300)]
    assert times[30] == pytest.approx(12 * MS, rel=0.005), "full heat of the first one alone"
    assert times[-1] == pytest.approx(12.5 * MS, rel=0.005)
    assert stage.step(200 * MS, 10 * MS, 10e6, 0.5) < 10.5 * MS, "the first one has forgotten"


SIZED = GpuClock(limits=(LIMIT,), attention=0.5, tokens=(64, 256), power=(1.5, 0.5))


@pytest.mark.parametrize(("num", "rate", "power"), [(1, 0.1, 0.15), (64, 0.5, 0.75), (64, 0.9, 1.0), (160, 0.5, 0.5)])
def test_power_of_a_size_follows_its_rate(num, rate, power):
    assert SIZED.base_power(num, rate, has_chunks=True) == pytest.approx(power)
    assert CLOCK.base_power(num, rate, has_chunks=True) == rate, "without sizes it is the rate"


def test_beyond_its_sizes_power_is_that_of_the_nearest():
    assert [SIZED.base_power(num, 0.5, has_chunks=True) for num in (256, 257, 10_000)] == [0.25] * 3
    assert [SIZED.base_power(num, 0.5, has_chunks=True) for num in (63, 1)] == [0.75] * 2


def test_decodes_alone_may_draw_something_else():
    found = [SIZED.base_power(256, 0.5, has_chunks=False), SIZED.base_power(8, 0.5, has_chunks=False)]
    assert found == [0.25, 0.75], "they draw what sizes do"
    other = replace(SIZED, decode=1.2)
    assert [other.base_power(num, 0.5, has_chunks=False) for num in (8, 256)] == [0.6] * 2
    assert other.base_power(256, 0.9, has_chunks=False) == 1.0
    assert other.base_power(256, 0.5, has_chunks=True) == 0.25
