"""The simulator's loop under pytest-benchmark: `pytest benchmarks`. CPU time, not wall time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from common import calibrate, pick_trace, read_workload
from sim_speed import build

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

NUM_REQUESTS = 10_000


@pytest.mark.benchmark(group="simulator loop", timer=time.process_time)
@pytest.mark.parametrize("pp", [1, 4])
def test_loop(benchmark: BenchmarkFixture, pp: int) -> None:
    """Ten thousand requests, all queued at the start."""
    trace = read_workload(pick_trace(None), NUM_REQUESTS)
    yardstick = calibrate()

    def prepare() -> tuple[tuple[object, ...], dict[str, object]]:
        simulation, _, engine = build(trace, pp)
        engines.append(engine)
        return (simulation,), {}

    engines: list = []
    benchmark.pedantic(lambda simulation: simulation.run(), setup=prepare, rounds=3)
    num_iterations = engines[-1].view.num_plans
    seconds = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "trace": trace.name,
        "requests_per_s": NUM_REQUESTS / seconds,
        "iterations_per_s": num_iterations / seconds,
        "iterations_per_simpy_timeout": num_iterations / seconds / yardstick["simpy_timeouts_per_s"],
    }
    assert engines[-1].num_unfinished == 0
