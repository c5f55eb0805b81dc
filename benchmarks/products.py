"""The products of a decode step by our kernel for few rows, over many tunings, and by cuBLAS.

    python benchmarks/products.py [MODEL ...] [--rows 1 64 ...] [--out FOLDER]

For each product of a dense model's layer, and its head, and each number of rows: some forty tunings of
gllm_kernels.linear, beside torch's own product with cuBLAS and with cublasLt as the preferred library; gate and up
together with the gate's activation, which is fused into ours. Each runs inside a CUDA graph over the weights of many
layers, so that none is found in the cache. Prints the best of ours and what a step's products come to, and writes
products_MODEL_GPU.json. Kernels are compiled first, on all cores. Needs a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product as combinations
from math import ceil, fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from gllm_kernels.linear import Tuning, linear_kernel, linear_triton, make_launch, make_scratch
from gllm_kernels.silu_and_mul import silu_and_mul
from gpu import captured_seconds, require_gpu
from record import OUT, describe_run, show_table, slug, write_json
from torch.nn import functional

from gllm.console.options import whole
from gllm.console.parser import Parser
from gllm.model_shape import load_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from gllm.model_shape import ModelShape

ROWS = 1, 4, 16, 32, 64, 128, 256
WEIGHTS_BYTES = 200e6  # that calls take turns with: several times the L2 cache (60 MB of an H200)
GRAPH_S = 100e-6  # a graph lasts long enough that starting it hardly counts
BYTES_PER_S = 4.3e12  # of the memory of an H200
BYTES_PER_S_PER_MULTIPROCESSOR = 60e9  # what one can take in, about
SHARING_S = 1.5e-6  # what it takes to add up partial sums, about
SHARED_BYTES = 227 << 10  # of a multiprocessor, from Hopper on
NUM_DOTLESS, NUM_CUTS, NUM_FINALISTS = 18, 5, 3
LIBRARIES = {"cuBLAS": "default", "cublasLt": "cublaslt"}  # torch's names
ERROR = 1e-2  # the most that rounding explains


class Product(NamedTuple):
    """One of a step's products: rows [M, K] with weights [N, K]."""

    name: str
    num_columns: int  # N
    size: int  # K
    gated: bool
    num_calls: int  # a step

    @property
    def num_outputs(self) -> int:
        """Columns of the output."""
        return self.num_columns >> self.gated

    @property
    def num_bytes(self) -> int:
        """Of the weights, in bf16."""
        return 2 * self.num_columns * self.size


class Cut(NamedTuple):
    """What a tuning says of who computes what."""

    block_m: int
    block_n: int
    split_k: int

    def num_programs(self, product: Product, num_rows: int) -> int:
        """Of the whole grid."""
        return ceil(num_rows / self.block_m) * ceil(product.num_outputs / self.block_n) * self.split_k

    def estimate_s(self, product: Product, num_rows: int, num_multiprocessors: int) -> float:
        """How long the busiest multiprocessor takes in rows and weights, and what partial sums add."""
        size = (min(self.block_m, num_rows) + (self.block_n << product.gated)) * product.size / self.split_k
        rounds = ceil(self.num_programs(product, num_rows) / num_multiprocessors)
        reading_s = rounds * 2 * size / BYTES_PER_S_PER_MULTIPROCESSOR
        if self.split_k == 1:
            return reading_s
        return reading_s + SHARING_S + 8 * self.split_k * num_rows * product.num_columns / BYTES_PER_S


class Kernel(NamedTuple):
    """What is compiled: the same for any number of rows."""

    product: Product
    tuning: Tuning


def products_of(shape: ModelShape) -> list[Product]:
    """Those of a step of a whole model.

    Raises:
        ValueError: its layers have experts.
    """
    if shape.is_moe:
        raise ValueError(f"{shape.name}: the products of expert layers are grouped; name a dense model")
    hidden, width, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    attention = shape.num_heads * shape.head_dim
    return [
        Product("qkv", attention + shape.kv_elements_per_token, hidden, gated=False, num_calls=layers),
        Product("attention out", hidden, attention, gated=False, num_calls=layers),
        Product("gate and up", 2 * width, hidden, gated=True, num_calls=layers),
        Product("down", hidden, width, gated=False, num_calls=layers),
        Product("head", shape.vocab_size, hidden, gated=False, num_calls=1),
    ]


def tunings_of(product: Product, num_rows: int, num_multiprocessors: int) -> list[Tuning]:
    """At most 40 that arithmetic does not rule out."""

    def best(cuts: Iterable[Cut], most: int) -> list[Cut]:
        return sorted(cuts, key=lambda cut: cut.estimate_s(product, num_rows, num_multiprocessors))[:most]

    found = []
    if num_rows == 1:
        cuts = best((Cut(1, block_n, split) for block_n in (2, 4, 8, 16) for split in (1, 2)), 6)
        found = [tuning for cut in cuts for tuning in without_dots(product, cut)][:NUM_DOTLESS]
    cuts = best(cuts_of(product, num_rows), NUM_CUTS - 2 * bool(found))
    return found + [
        tuning
        for cut in cuts
        for tuning in with_dots(product, cut, ceil(cut.num_programs(product, num_rows) / num_multiprocessors))
    ]


def cuts_of(product: Product, num_rows: int) -> Iterator[Cut]:
    """Blocks whose sums fit into the registers, and parts of K worth a program."""
    whole_m = min(max(16, 1 << (num_rows - 1).bit_length()), 256)
    blocks = (max(16, whole_m // 2), whole_m), (16, 32, 64, 128, 256), (1, 2, 4, 8)
    for cut in sorted({Cut(*sizes) for sizes in combinations(*blocks)}):
        if cut.block_m * cut.block_n << product.gated <= 128 * 256 and (
            cut.split_k == 1 or product.size >= 512 * cut.split_k
        ):
            yield cut


def without_dots(product: Product, cut: Cut) -> Iterator[Tuning]:
    """Weights in registers: 32 to 256 bytes of each thread are on their way."""
    for block_k, num_warps in ((1024, 4), (512, 4), (1024, 8), (512, 2), (256, 1)):
        thread_bytes = 2 * (cut.block_n << product.gated) * block_k / (32 * num_warps)
        if 32 <= thread_bytes <= 256 and block_k * cut.split_k <= product.size:
            yield Tuning(cut.block_m, cut.block_n, block_k, cut.split_k, num_warps, 1)


def with_dots(product: Product, cut: Cut, num_residents: int) -> Iterator[Tuning]:
    """At most 7, their pipelines as deep as shared memory allows, two side by side on a multiprocessor if there are."""
    num_sums = cut.block_m * cut.block_n << product.gated
    num_warps = 8 if num_sums >= 128 * 128 else 4
    for block_k in (64, 128, 256):
        stage_bytes = 2 * block_k * (cut.block_m + (cut.block_n << product.gated))
        num_steps = ceil(product.size / (block_k * cut.split_k))
        num_stages = min(8, num_steps + 1, SHARED_BYTES // min(num_residents, 2) // stage_bytes)
        if num_stages < 2 or block_k * cut.split_k > product.size:
            continue
        tuning = Tuning(cut.block_m, cut.block_n, block_k, cut.split_k, num_warps, num_stages)
        yield tuning
        yield tuning._replace(tma=True)
        if block_k == 128:
            yield tuning._replace(num_warps=2 if num_sums <= 16 * 64 else 12 - num_warps)


class Target:
    """Stands in for Triton's driver in processes that only compile: what for, without a call to CUDA."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        """Some."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Some."""
        return 0

    def get_current_target(self) -> Any:  # noqa: ANN401 - of Triton's own type
        """The GPU that is measured."""
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - Triton may be missing

        return GPUTarget("cuda", self._capability, 32)


def only_compile(capability: int) -> None:
    """Make this process one that compiles."""
    from triton.runtime import driver  # noqa: PLC0415 - Triton may be missing

    driver.set_active(Target(capability))


def compile_kernel(kernel: Kernel) -> int | None:
    """Compile into Triton's cache; the shared memory it needs, None if it cannot be compiled."""
    (_, num_columns, size, gated, _), tuning = kernel
    x, w, out = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((tuning.block_m, size), (num_columns, size), (tuning.block_m, num_columns >> gated))
    )
    scratch = make_scratch(tuning.block_m, num_columns, tuning, x.device)
    grid, arguments, constants = make_launch(out, x, w, tuning=tuning, scratch=scratch, gated=gated)
    try:
        compiled = linear_kernel.warmup(*arguments, grid=grid, **constants)
    except Exception:  # noqa: BLE001 - the other tunings still run
        return None
    return int(compiled.metadata.shared)


def compile_all(kernels: Sequence[Kernel], capability: int) -> set[Kernel]:
    """Those that can be compiled and fit into shared memory; one process a core does it."""
    # Forks have torch and Triton loaded. They call no CUDA, so that it does not matter whether their parent has.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, only_compile, (capability,)) as pool:
        sizes = pool.map(compile_kernel, kernels, chunksize=4)
        return {
            kernel for kernel, size in zip(kernels, sizes, strict=True) if size is not None and size <= SHARED_BYTES
        }


def make_weights(product: Product) -> list[Tensor]:
    """Of as many layers as there are, or as no cache holds together."""
    copies = min(product.num_calls, ceil(WEIGHTS_BYTES / product.num_bytes))
    shape = product.num_columns, product.size
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda").div_(product.size**0.5) for _ in range(copies)]


class Case:
    """One product of so many rows: what is timed takes turns with the weights."""

    def __init__(self, product: Product, num_rows: int, weights: Sequence[Tensor]) -> None:
        self.product, self.num_rows = product, num_rows
        self._weights = weights
        self._x = torch.randn(num_rows, product.size, dtype=torch.bfloat16, device="cuda")
        least_s = max(product.num_bytes / BYTES_PER_S, 2e-6)
        self._num_rounds = ceil(GRAPH_S / (len(weights) * least_s))
        self._expected = self.theirs(self._x, weights[0]).float()

    def theirs(self, x: Tensor, w: Tensor) -> Tensor:
        """By torch; gated, with our kernel for the gate."""
        out = functional.linear(x, w)
        return silu_and_mul(out) if self.product.gated else out

    def ours(self, tuning: Tuning) -> Callable[[Tensor, Tensor], Tensor]:
        """By our kernel."""
        scratch = make_scratch(self.num_rows, self.product.num_columns, tuning, self._x.device)
        return partial(linear_triton, tuning=tuning, scratch=scratch, gated=self.product.gated)

    def seconds(self, run: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Of one call, inside a graph."""
        return captured_seconds([partial(run, self._x, w) for w in self._weights], self._num_rounds)

    def library_seconds(self, library: str) -> float:
        """Of torch's, with the library that it calls by this name."""
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return self.seconds(self.theirs)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    def try_seconds(self, tuning: Tuning) -> float | str:
        """Of one call, or what is wrong with it."""
        try:
            run = self.ours(tuning)
            out = run(self._x, self._weights[0]).float()
            error = ((out - self._expected).norm() / self._expected.norm()).item()
            return self.seconds(run) if error < ERROR else f"result differs by {error:.2g}"
        except Exception as error:  # noqa: BLE001 - the other tunings still run
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(case: Case, tunings: Sequence[Tuning]) -> dict[str, Any]:
    """One row: times of a call in microseconds, the best tunings, and what was wrong with others."""
    tried = {tuning: case.try_seconds(tuning) for tuning in tunings}
    times = {tuning: seconds for tuning, seconds in tried.items() if isinstance(seconds, float)}
    # The least of forty medians is lucky: those that did best run once more, beside the rivals.
    again = {tuning: case.seconds(case.ours(tuning)) for tuning in sorted(times, key=times.__getitem__)[:NUM_FINALISTS]}
    ranked = sorted(again, key=again.__getitem__)
    return {
        **case.product._asdict(),
        "rows": case.num_rows,
        "ours_us": microseconds(again[ranked[0]]) if ranked else None,
        **{f"{name.lower()}_us": microseconds(case.library_seconds(theirs)) for name, theirs in LIBRARIES.items()},
        "best": [{"us": microseconds(again[tuning]), **tuning._asdict()} for tuning in ranked],
        "num_tunings": len(times),
        "wrong": [{"what": what, **tuning._asdict()} for tuning, what in tried.items() if isinstance(what, str)],
    }


def microseconds(seconds: float) -> float:
    """Rounded."""
    return round(1e6 * seconds, 2)


def sum_up(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of rows, microseconds of a whole step's products: torch's own, and the best of each."""
    steps = []
    for num_rows in sorted({row["rows"] for row in rows}):
        there = [row for row in rows if row["rows"] == num_rows]
        alone = fsum(row["num_calls"] * row["cublas_us"] for row in there)
        best = fsum(row["num_calls"] * min(times_of(row).values()) for row in there)
        steps.append({"rows": num_rows, "cublas_us": round(alone, 1), "best_us": round(best, 1)})
    return steps


def times_of(row: dict[str, Any]) -> dict[str, float]:
    """Who took how many microseconds; ours only if there is a tuning that ran."""
    times = {name: row[f"{name.lower()}_us"] for name in LIBRARIES}
    return times if row["ours_us"] is None else {"ours": row["ours_us"], **times}


def show(result: dict[str, Any]) -> None:
    """The table, then the sums."""
    cells = []
    for row in result["products"]:
        tuning = list(row["best"][0].values())[1:] if row["best"] else []
        ratio = f"{row['cublas_us'] / row['ours_us']:.2f}" if row["best"] else "-"
        times = [row["ours_us"] or "-", *(row[f"{name.lower()}_us"] for name in LIBRARIES), ratio]
        cells.append([row["name"], row["rows"], *times, " ".join(str(int(each)) for each in tuning)])
    show_table(
        ["product", "rows", "ours us", *LIBRARIES, "cuBLAS / ours", f"tuning: {' '.join(Tuning._fields)}"], cells
    )
    print()
    sums = [[step["rows"], step["cublas_us"], step["best_us"]] for step in result["steps"]]
    show_table(["a step's products, rows", "cuBLAS us", "best of each"], sums)


def run(shape: ModelShape, counts: Sequence[int], path: Path) -> dict[str, Any]:
    """Compile and measure all; what is done is on disk already should a later product take everything down."""
    device = torch.cuda.get_device_properties(0)
    sweep = {
        (product, num_rows): tunings_of(product, num_rows, device.multi_processor_count)
        for product in products_of(shape)
        for num_rows in counts
    }
    kernels = {Kernel(product, tuning): None for (product, _), tunings in sweep.items() for tuning in tunings}
    started = time.perf_counter()
    usable = compile_all(list(kernels), 10 * device.major + device.minor)
    print(f"{len(usable)} of {len(kernels)} kernels compiled in {time.perf_counter() - started:.0f} s", flush=True)
    result = {**describe_run(("torch", "triton")), "model": shape.name, "gpu": device.name, "products": [], "steps": []}
    weights: list[Tensor] = []
    for (product, num_rows), tunings in sweep.items():
        if num_rows == counts[0]:
            weights = make_weights(product)
        case = Case(product, num_rows, weights)
        result["products"].append(measure(case, [each for each in tunings if Kernel(product, each) in usable]))
        write_json(path, result)
    result["steps"] = sum_up(result["products"])
    write_json(path, result)
    print(f"measured in {time.perf_counter() - started:.0f} s, compiling included")
    return result


def main() -> int:
    """Measure, print and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["qwen3-0.6b"], metavar="MODEL", help="a shape, or a folder")
    parser.add_argument("--rows", nargs="+", type=whole(1), default=ROWS, metavar="M", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the results (default: {OUT})")
    args = parser.parse_args()
    try:
        shapes = [load_shape(name) for name in args.models]
        for shape in shapes:
            products_of(shape)
    except ValueError as error:
        parser.error(str(error))
    require_gpu()
    for shape in shapes:
        path = args.out / f"{slug('products', shape.name, torch.cuda.get_device_name())}.json"
        show(run(shape, args.rows, path))
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
