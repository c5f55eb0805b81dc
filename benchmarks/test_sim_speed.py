"""The simulator's loop under pytest-benchmark: `pytest benchmarks`. CPU time, not wall time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from common import calibrate, pick_trace, read_workload
from sim_speed import configure

from gllm.sim.run import simulate

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

NUM_REQUESTS = 10_000


@pytest.mark.benchmark(group="simulator loop", timer=time.process_time)
@pytest.mark.parametrize("pp", [1, 4])
def test_loop(benchmark: BenchmarkFixture, pp: int) -> None:
    """Ten thousand requests, all queued at the start."""
    trace = read_workload(pick_trace(None), NUM_REQUESTS)
    yardstick = calibrate()
    record = benchmark.pedantic(simulate, args=(configure(pp), trace), rounds=3)
    seconds = benchmark.stats.stats.min
    num_iterations = len(record.batches)
    benchmark.extra_info |= {
        "trace": trace.name,
        "requests_per_s": NUM_REQUESTS / seconds,
        "iterations_per_s": num_iterations / seconds,
        "iterations_per_simpy_timeout": num_iterations / seconds / yardstick["simpy_timeouts_per_s"],
    }
    assert len(record.requests) == NUM_REQUESTS
    assert (record.requests["finish_ns"] >= 0).all(), "not every request ended"
