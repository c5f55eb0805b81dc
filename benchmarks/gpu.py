"""Timing on a GPU: needs torch alone."""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPETITIONS = 20
NUM_WARM_UPS = 3


def require_gpu() -> None:
    """End with one line where torch sees no GPU."""
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and torch sees none here")


def gpu_seconds(work: Callable[[], object]) -> float:
    """Median device time of `work`."""
    times = []
    for number in range(NUM_WARM_UPS + REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if number >= NUM_WARM_UPS:
            times.append(start.elapsed_time(end) / 1000)
    return median(times)


def captured_seconds(works: Sequence[Callable[[], object]], num_rounds: int = 1) -> float:
    """Device time of one of these works, which run one after another inside a CUDA graph, `num_rounds` times over."""
    for work in works:  # compiles, and makes what is made once
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What they return is kept, so that each writes memory of its own and not what the one before left in the cache.
        outputs = [work() for _ in range(num_rounds) for work in works]
    return gpu_seconds(graph.replay) / len(outputs)
