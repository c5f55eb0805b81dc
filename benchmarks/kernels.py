"""Every kernel against what the GPU reaches at best, and against its rivals.

    python benchmarks/kernels.py [--op NAME] [--out FOLDER] [--sweep]

The cases are those of benchmarks/kernel_cases/. Each runs inside a CUDA graph over enough copies of its inputs that
none is found in the cache. The time is set against the larger of two floors: bytes that must move over the bandwidth of
a copy, and operations over the rate of a matrix product, both as benchmarks/ceilings.py measured them on such a GPU
(else they are measured first). Writes kernels_GPU.json. Needs torch, triton and this repository.

--sweep measures the kernels' settings instead (kernels-sweep_GPU.json).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from itertools import chain
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from ceilings import measure as measure_ceilings
from gpu import captured_seconds, require_gpu
from record import OUT, RESULTS, ROOT, describe_run, slug, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kernel_cases.case import Case, Work

COPIES_BYTES, MAX_COPIES = 200e6, 32  # together several times the L2 cache (60 MB of an H200)
GRAPH_S, MAX_ROUNDS = 500e-6, 16  # a graph lasts long enough that starting it hardly counts
KERNEL_S = 1e-6  # the least a kernel takes


class Ceilings(NamedTuple):
    """What the GPU reaches at best."""

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, case: Case) -> tuple[float, str]:
        """The least time of a case, and what binds it."""
        return max((case.num_bytes / self.bytes_per_s, "bytes"), (case.num_flops / self.flop_per_s, "flops"))


def read_ceilings(gpu: str) -> Ceilings:
    """Measured ceilings of that GPU, from the results or now."""
    path = RESULTS / f"{slug('ceilings', gpu)}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else measure_ceilings()
    return Ceilings(found["copy_tb_per_s"] * 1e12, found["bf16_product_tflop_per_s"] * 1e12)


def load_cases(*, sweep: bool) -> tuple[list[Case], list[dict[str, Any]]]:
    """All cases, and a row for each module that failed to name its own."""
    sys.path.append(str(ROOT / "kernels"))  # the kernels need not be installed
    cases, failed = [], []
    for path in sorted(Path(__file__).with_name("kernel_cases").glob("*.py")):
        if path.stem in {"__init__", "case"}:
            continue
        try:
            module = importlib.import_module(f"kernel_cases.{path.stem}")
            cases += getattr(module, "sweep", list)() if sweep else module.cases()
        except Exception as error:  # noqa: BLE001 - the other modules' cases still run
            failed.append({"op": path.stem, "size": "its cases", "error": one_line(error)})
    return cases, failed


def one_line(error: Exception) -> str:
    """An error for a row of a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """One row: time of a call, rate, share of the ceiling, times of the rivals; or the error."""
    row: dict[str, Any] = {"op": case.op, "size": case.size}
    floor_s, bound = ceilings.floor_s(case)
    copies = min(max(ceil(COPIES_BYTES / case.num_bytes), 1), MAX_COPIES)
    rounds = min(max(ceil(GRAPH_S / (copies * max(floor_s, KERNEL_S))), 1), MAX_ROUNDS)

    def seconds(make: Callable[[int], list[Work]]) -> float:
        try:
            return captured_seconds(make(copies), rounds)
        finally:
            torch.cuda.empty_cache()

    try:
        took_s = seconds(case.make)
    except Exception as error:  # noqa: BLE001 - the other cases still run
        return {**row, "error": one_line(error)}
    row |= {
        "copies": copies,
        "us": round(took_s * 1e6, 2),
        "tb_per_s": round(case.num_bytes / took_s / 1e12, 3),
        "tflop_per_s": round(case.num_flops / took_s / 1e12, 1),
        "bound": bound,
        "share": round(floor_s / took_s, 3),
        "rivals_us": {},
    }
    for name, make in case.rivals.items():
        try:
            row["rivals_us"][name] = round(seconds(make) * 1e6, 2)
        except Exception as error:  # noqa: BLE001 - a rival that cannot do this is no fault of ours
            row["rivals_us"][name] = one_line(error)
    return row


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    start = f"{row['op']:<20} {row['size']:<46}"
    if "error" in row:
        print(f"{start} {row['error']}", flush=True)
        return
    rate = f"{row['tb_per_s']:.2f} TB/s" if row["bound"] == "bytes" else f"{row['tflop_per_s']:.0f} TFLOP/s"
    rivals = "  ".join(f"{name} {us}" for name, us in row["rivals_us"].items())
    print(f"{start} {row['us']:>10.2f} {rate:>12} {row['share']:>6.0%}  {rivals}", flush=True)


def run(cases: Sequence[Case], failed: list[dict[str, Any]], gpu: str, path: Path) -> list[dict[str, Any]]:
    """Measure all; what is done is on disk already should a later case take everything down."""
    ceilings = read_ceilings(gpu)
    head = {
        **describe_run(("torch", "triton")),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "ceilings": {"tb_per_s": ceilings.bytes_per_s / 1e12, "tflop_per_s": ceilings.flop_per_s / 1e12},
    }
    print(f"{'op':<20} {'size':<46} {'us':>10} {'rate':>12} {'share':>6}  rivals' us")
    rows: list[dict[str, Any]] = []
    for row in chain(failed, (measure(case, ceilings) for case in cases)):
        show(row)
        rows.append(row)
        write_json(path, {**head, "rows": rows})
    return rows


def main() -> int:
    """Measure, print and write; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", metavar="NAME", help="measure this operation alone; may be repeated")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--sweep", action="store_true", help="measure the kernels' settings instead")
    options = parser.parse_args()
    require_gpu()
    cases, failed = load_cases(sweep=options.sweep)
    if options.op:
        if unknown := set(options.op) - {case.op for case in cases}:
            parser.error(f"--op {unknown.pop()}: there are {', '.join(sorted({case.op for case in cases}))}")
        cases = [case for case in cases if case.op in options.op]
    gpu = torch.cuda.get_device_name()
    path = options.out / f"{slug('kernels-sweep' if options.sweep else 'kernels', gpu)}.json"
    rows = run(cases, failed, gpu, path)
    print(f"written: {path}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
