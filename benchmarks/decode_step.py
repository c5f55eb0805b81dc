"""Where the time of a decode step goes: one worker's stage in this process, without the engine around it.

    python benchmarks/decode_step.py qwen3-8b [--batch 1,64,256] [--context 1000] [--out FOLDER]

Random weights, a cache full of random keys, `--batch` sequences of `--context` tokens. For each batch size: the time
of a step on the GPU and of its launch on the host, the bytes that it must read (weights once, every sequence's keys
and values) and the bandwidth that this makes; then a few steps under torch's profiler, their kernels by kind, and the
gaps between them. Writes decode_step_MODEL_GPU.json and .svg. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from gpu import require_gpu
from model_folder import model_folder, model_name
from record import OUT, ROOT, RUNTIME_PACKAGES, describe_run, slug
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gllm.console.options import whole
from gllm.console.parser import Parser
from gllm.core import Limits
from gllm.runtime.messages import Admission, ChunkWork, Step
from gllm.runtime.model_config import load_model_config
from gllm.runtime.models import MODELS
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.shard import Shard
from gllm.runtime.weights import fill_with_dummy_weights
from gllm.runtime.worker.groups import Neighbours
from gllm.runtime.worker.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BLOCK_SIZE = 16
NUM_STEPS = 40
NUM_ROUNDS = 5  # of these steps
NUM_PROFILED = 4
KINDS = (  # the first that a kernel's name holds
    ("attention", ("_decode_kernel", "_chunk", "flash")),
    ("attention plan, inputs", ("_plan_kernel", "_plan_chunks_kernel", "_lay_out", "_set_blocks")),
    ("norm, rotary, cache", ("norm",)),
    ("activation", ("silu",)),
    ("experts", ("expert", "moe", "route", "grouped")),
    ("sampling", ("_best_of", "argmax")),
    ("matrix products", ("_one_row", "_few_rows", "gemm", "gemv", "cutlass", "nvjet", "splitK", "cublas", "matmul")),
)


class Span(NamedTuple):
    """A kernel on the GPU; microseconds."""

    name: str
    start: float
    end: float


def make_stage(folder: Path, *, max_num_seqs: int, context: int, max_tokens: int = 1) -> Stage:
    """A whole model on this GPU, with room for so many sequences of that length and what the steps add.

    Steps with chunks are captured, too, up to `max_tokens`.
    """
    config = load_model_config(folder)
    device = torch.device("cuda")
    shard = Shard(layers=range(config.shape.num_layers))
    model = MODELS[config.architecture](config, shard, torch.bfloat16, device).eval()
    fill_with_dummy_weights(model)
    longest = context + 4 * NUM_STEPS
    limits = Limits(
        num_blocks=max_num_seqs * -(-longest // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        depth=1,
    )
    neighbours = Neighbours(None, None, None)
    stage = Stage(model, neighbours, stage=0, limits=limits, backend="triton", report=lambda _: None, keeps_time=False)
    for cache in stage.caches:
        cache.keys.normal_()
        cache.values.normal_()
    stage.capture(max_tokens)
    return stage


class Batch:
    """Sequences that decode: makes their steps."""

    def __init__(self, size: int, context: int) -> None:
        self.size, self._length, self._plan = size, context, 0
        self._slots = array("i", range(size)).tobytes()
        self._next_block = 0

    def start(self) -> Step:
        """The step that gives every sequence its context: its last token is computed, the rest lies there."""
        params = SamplingParams(temperature=0.6, ignore_eos=True)
        tokens = [7] * self._length
        admissions = [Admission(slot, tokens, self._length, params, slot, []) for slot in range(self.size)]
        num = -(-self._length // BLOCK_SIZE)
        last = self._length - 1
        chunks = [ChunkWork(slot, last, 1, final=True, blocks=self._blocks(num)) for slot in range(self.size)]
        return Step(0, admissions, chunks, 0, b"", [], -1)

    def step(self) -> Step:
        """One more token of each."""
        self._plan += 1
        self._length += 1
        grown = [(slot, self._blocks(1)[0]) for slot in range(self.size)] if self._length % BLOCK_SIZE == 1 else []
        return Step(self._plan, [], [], self.size, self._slots, grown, self._plan - 1)

    def _blocks(self, num: int) -> list[int]:
        self._next_block += num
        return list(range(self._next_block - num, self._next_block))


def measure(stage: Stage, size: int, context: int) -> tuple[dict[str, Any], list[Span]]:
    """Times of a step; the spans of the kernels of the last profiled one."""
    batch = Batch(size, context)
    stage.run(batch.start())
    for _ in range(3):
        stage.run(batch.step())
    torch.cuda.synchronize()
    host = []
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_ROUNDS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(NUM_STEPS // NUM_ROUNDS):
            step, began = batch.step(), time.perf_counter()
            stage.run(step)
            host.append(time.perf_counter() - began)
        mark.record()
    torch.cuda.synchronize()
    # A pause of the host's, as a garbage collection is, must not count.
    rounds_ms = [before.elapsed_time(after) for before, after in pairwise(marks)]
    step_us = 1000 * median(rounds_ms) / (NUM_STEPS // NUM_ROUNDS)
    spans = profiled(lambda: stage.run(batch.step()))
    num_bytes = bytes_read(stage, size, context + NUM_STEPS // 2)
    return {
        "batch": size,
        "context": context,
        "step_us": round(step_us, 1),
        "host_us": round(1e6 * median(host), 1),
        "bytes": num_bytes,
        "tb_per_s": round(num_bytes / step_us / 1e6, 3),
        "kernels_per_step": round(len(spans) / NUM_PROFILED),
        "us_by_kind": by_kind(spans),
    }, spans[-(len(spans) // NUM_PROFILED) :]


def profiled(run: Callable[[], object]) -> list[Span]:
    """The kernels of `NUM_PROFILED` runs, in order of time."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(NUM_PROFILED):
            run()
        torch.cuda.synchronize()
    spans = (
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    return sorted(spans, key=lambda span: span.start)


def bytes_read(stage: Stage, size: int, context: int) -> int:
    """What a step cannot do without: its weights (of the embedding, single rows), and all keys and values once."""
    model = stage.model
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.embedding.weight.numel() * model.embedding.weight.element_size()
    keys = stage.caches[0].keys
    return weights + 2 * len(stage.caches) * size * context * keys[0, 0].numel() * keys.element_size()


def in_turn(spans: Sequence[Span]) -> Iterator[Span]:
    """Of each span its own time: until the kernel ahead has ended, one that was launched early only waits."""
    last = spans[0].start
    for span in spans:
        start, last = max(span.start, last), max(span.end, last)
        yield Span(span.name, start, last)


def by_kind(spans: Sequence[Span]) -> dict[str, float]:
    """Microseconds a step in kernels of each kind, and between kernels."""
    found = dict.fromkeys([*(kind for kind, _ in KINDS), "other", "gaps"], 0.0)
    last = spans[0].start
    for span in in_turn(spans):
        found[kind_of(span.name)] += span.end - span.start
        found["gaps"] += span.start - last
        last = span.end
    return {kind: round(us / NUM_PROFILED, 1) for kind, us in found.items()}


def kind_of(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")


def draw(result: dict[str, Any], timelines: dict[int, list[Span]], path: Path) -> None:
    """A picture: a step's time by kind for each batch size, and the first layers of one step, kernel by kernel."""
    import matplotlib as mpl  # noqa: PLC0415 - only here

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    kinds = [*(kind for kind, _ in KINDS), "other", "gaps"]
    colours = dict(zip(kinds, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(1 + len(timelines), 1, figsize=(11, 2.2 * (1 + len(timelines))), layout="constrained")
    names = [f"{each['batch']} x {each['context']}" for each in result["steps"]]
    left = [0.0] * len(names)
    for kind in kinds:
        widths = [100 * each["us_by_kind"][kind] / sum(each["us_by_kind"].values()) for each in result["steps"]]
        axes[0].barh(names, widths, left=left, label=kind, color=colours[kind])
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    axes[0].set(title=f"{result['model']} on {result['gpu']}: a decode step by kind of kernel", xlabel="% of the step")
    axes[0].legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    for axis, (size, spans) in zip(axes[1:], timelines.items(), strict=True):
        shown = spans[:34]
        for span in in_turn(shown):
            bar = [(span.start - shown[0].start, span.end - span.start)]
            axis.broken_barh(bar, (0, 1), facecolors=colours[kind_of(span.name)], edgecolor="white", linewidth=0.3)
        axis.set(title=f"{size} sequences: inputs and the first layers", xlabel="µs", yticks=[])
    figure.savefig(path)
    plt.close(figure)


def counts(text: str) -> list[int]:
    """`1,64,256`."""
    return [whole(1)(part) for part in text.split(",")]


def main() -> int:
    """Measure, print and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen3-0.6b", help="a folder with config.json, or a shape's name")
    parser.add_argument(
        "--batch", type=counts, default=[1, 64, 256], metavar="N,...", help="batch sizes (default: 1,64,256)"
    )
    parser.add_argument("--context", type=whole(1), default=1000, metavar="N", help="tokens of each sequence")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the result (default: {OUT})")
    args = parser.parse_args()
    require_gpu()
    gpu = torch.cuda.get_device_name()
    ceiling = json.loads((ROOT / "benchmarks/results/ceilings_nvidia-h200.json").read_text())["copy_tb_per_s"]
    with model_folder(args.model) as folder:
        result = {**describe_run(RUNTIME_PACKAGES), "model": model_name(folder), "gpu": gpu, "steps": []}
        stage = make_stage(folder, max_num_seqs=max(args.batch), context=args.context)
        timelines = {}
        for size in args.batch:
            found, timelines[size] = measure(stage, size, args.context)
            found["share_of_copy"] = round(found["tb_per_s"] / ceiling, 3)
            result["steps"].append(found)
            print(json.dumps(found), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = slug("decode_step", result["model"], gpu)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, timelines, args.out / f"{name}.svg")
    print(f"written: {args.out / name}.json, .svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
