"""What a GPU reaches at best: the measured side of the roofline's constants (gllm/sim/roofline.py).

    python benchmarks/ceilings.py [--out FOLDER]

Needs torch and one GPU, and nothing of gLLM. Writes ceilings_GPU.json: bandwidth of a large copy, rate of a
large bf16 matrix product on random data, host time of an eager launch, and time of a tiny kernel inside a
CUDA graph. Each is the median of several repetitions after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from gpu import REPETITIONS, gpu_seconds, require_gpu
from record import RESULTS, slug, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

COPY_BYTES = 8 << 30
PRODUCT_SIZE = 8192
NUM_LAUNCHES = 1000


def copy_bytes_per_s() -> float:
    """A device-to-device copy, bytes read and written both counted."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / gpu_seconds(lambda: target.copy_(source))


def product_flop_per_s() -> float:
    """A square bf16 matrix product."""
    left = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device="cuda")
    right = torch.randn_like(left)
    return 2 * PRODUCT_SIZE**3 / gpu_seconds(lambda: left @ right)


def tiny_launches() -> Callable[[], None]:
    """Many kernels that each take next to no time."""
    numbers = torch.randn(128, device="cuda")

    def launch() -> None:
        for _ in range(NUM_LAUNCHES):
            numbers.add_(1.0)

    return launch


def eager_launch_s() -> float:
    """Host time to launch one kernel from Python."""
    launch = tiny_launches()
    times = []
    for _ in range(REPETITIONS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch()
        times.append((time.perf_counter() - start) / NUM_LAUNCHES)
    return median(times)


def graph_kernel_s() -> float:
    """Time from one tiny kernel to the next inside a CUDA graph."""
    launch = tiny_launches()
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return gpu_seconds(graph.replay) / NUM_LAUNCHES


def measure() -> dict[str, Any]:
    """All of it, with what it was measured on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/ceilings.py",
        "gpu": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "copy_tb_per_s": round(copy_bytes_per_s() / 1e12, 3),
        "bf16_product_tflop_per_s": round(product_flop_per_s() / 1e12, 1),
        "eager_launch_us": round(eager_launch_s() * 1e6, 2),
        "graph_kernel_us": round(graph_kernel_s() * 1e6, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    folder = parser.parse_args().out
    require_gpu()
    result = measure()
    print(json.dumps(result, indent=1))
    write_json(folder / f"{slug('ceilings', result['gpu'])}.json", result)


if __name__ == "__main__":
    main()
