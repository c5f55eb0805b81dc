"""Where the time of a prompt step goes: one worker's stage in this process, without the engine around it.

    python benchmarks/prompt_step.py qwen3-8b [--tokens 2048,8192] [--prompt 512] [--decodes N] [--context 1000]
        [--out FOLDER]

Random weights. A step of `--tokens` tokens is made of prompts of `--prompt` tokens each; with `--decodes`, so many
sequences of `--context` tokens decode beside them. For each size: the time of a step on the GPU when steps follow each
other, of its launch on the host, the arithmetic rate that the model's products make of it; then, under torch's
profiler, its kernels by kind, and each of a layer's products with its own rate. Writes prompt_step_MODEL_GPU.json.
Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from decode_step import BLOCK_SIZE, NUM_PROFILED, Batch, by_kind, counts, kind_of, make_stage, profiled
from gpu import require_gpu
from model_folder import model_folder, model_name
from msgspec import structs
from record import OUT, RUNTIME_PACKAGES, describe_run, slug

from gllm.console.options import whole
from gllm.console.parser import Parser
from gllm.runtime.messages import Admission, ChunkWork, Step
from gllm.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from decode_step import Span

    from gllm.model_shape import ModelShape
    from gllm.runtime.worker.stage import Stage

NUM_STEPS = 12
PRODUCTS = "queries, keys, values", "attention's output", "gate and up", "down"  # in the order of a layer's kernels


class MixedBatch:
    """Prompts, and sequences that decode beside them: makes their steps.

    Args:
        num_tokens: of all prompts.
        prompt: tokens of each; the last one is shorter where they do not come out even.
        decodes: the others.
        num_blocks: of the cache; prompts have the last ones.
    """

    def __init__(self, num_tokens: int, prompt: int, decodes: Batch, num_blocks: int) -> None:
        self._decodes = decodes
        self._admissions, self._chunks = [], []
        params = SamplingParams(temperature=0.6, ignore_eos=True)
        for slot, start in enumerate(range(0, num_tokens, prompt), decodes.size):
            length = min(prompt, num_tokens - start)
            num_blocks -= -(-length // BLOCK_SIZE)
            blocks = list(range(num_blocks, num_blocks + -(-length // BLOCK_SIZE)))
            self._admissions.append(Admission(slot, [slot + 7] * length, length, params, slot, []))
            self._chunks.append(ChunkWork(slot, 0, length, final=True, blocks=blocks))

    def step(self) -> Step:
        """The prompts anew, each of which ends and is sampled, and one more token of whoever decodes."""
        step = self._decodes.step()
        return structs.replace(step, admissions=self._admissions, chunks=self._chunks)


def measure(stage: Stage, num_tokens: int, prompt: int, num_decodes: int, context: int) -> dict[str, Any]:
    """Times of a step, its kernels by kind, its products one by one."""
    decodes = Batch(num_decodes, context)
    if num_decodes:
        stage.run(decodes.start())
    batch = MixedBatch(num_tokens, prompt, decodes, len(stage.caches[0].keys))
    for _ in range(3):
        stage.run(batch.step())
    torch.cuda.synchronize()
    host = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(NUM_STEPS):
        step, began = batch.step(), time.perf_counter()
        stage.run(step)
        host.append(time.perf_counter() - began)
    end.record()
    torch.cuda.synchronize()
    step_us = 1000 * start.elapsed_time(end) / NUM_STEPS
    spans = profiled(lambda: stage.run(batch.step()))
    num_rows = num_tokens + num_decodes
    flop = sum(product_flop(stage.model.config.shape)) * stage.model.config.shape.num_layers * num_rows
    return {
        "tokens": num_tokens,
        "prompt": prompt,
        "decodes": num_decodes,
        "context": context if num_decodes else 0,
        "step_us": round(step_us, 1),
        "host_us": round(1e6 * median(host), 1),
        "tflop_per_s": round(flop / step_us / 1e6, 1),
        "kernels_per_step": round(len(spans) / NUM_PROFILED),
        "us_by_kind": by_kind(spans),
        "products": products(spans, stage.model.config.shape, num_rows),
    }


def product_flop(shape: ModelShape) -> list[int]:
    """Operations of each product of a dense layer, for one token."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, width = shape.hidden_size, shape.intermediate_size
    return [2 * hidden * (query + 2 * kv), 2 * query * hidden, 4 * hidden * width, 2 * width * hidden]


def products(spans: list[Span], shape: ModelShape, num_tokens: int) -> list[dict[str, Any]]:
    """Median time and rate of each of a layer's products; nothing where they are not four kernels a layer."""
    times = [span.end - span.start for span in spans if kind_of(span.name) == "matrix products"]
    per_step = len(times) // NUM_PROFILED
    if per_step != 4 * shape.num_layers + 1:  # the head is the last
        return []
    found = []
    for index, (name, flop) in enumerate(zip(PRODUCTS, product_flop(shape), strict=True)):
        us = median(
            times[step * per_step + 4 * layer + index]
            for step in range(NUM_PROFILED)
            for layer in range(shape.num_layers)
        )
        found.append({"product": name, "us": round(us, 1), "tflop_per_s": round(flop * num_tokens / us / 1e6, 1)})
    return found


def main() -> int:
    """Measure, print and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen3-0.6b", help="a folder with config.json, or a shape's name")
    parser.add_argument(
        "--tokens", type=counts, default=[2048, 8192], metavar="N,...", help="of a step (default: 2048,8192)"
    )
    parser.add_argument(
        "--prompt", type=whole(1), default=512, metavar="N", help="tokens of each prompt (default: 512)"
    )
    parser.add_argument(
        "--decodes", type=whole(0), default=0, metavar="N", help="sequences that decode beside them (default: 0)"
    )
    parser.add_argument("--context", type=whole(1), default=1000, metavar="N", help="tokens of each (default: 1000)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the result (default: {OUT})")
    args = parser.parse_args()
    require_gpu()
    gpu = torch.cuda.get_device_name()
    with model_folder(args.model) as folder:
        result = {**describe_run(RUNTIME_PACKAGES), "model": model_name(folder), "gpu": gpu, "steps": []}
        most, longest = max(args.tokens), max(args.prompt, args.context if args.decodes else 0)
        num_sequences = args.decodes + -(-most // args.prompt)
        stage = make_stage(folder, max_num_seqs=num_sequences, context=longest, max_tokens=most + args.decodes)
        for size in args.tokens:
            result["steps"].append(measure(stage, size, args.prompt, args.decodes, args.context))
            print(json.dumps(result["steps"][-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug('prompt_step', result['model'], gpu)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
