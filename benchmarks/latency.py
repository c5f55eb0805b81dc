"""Latency of static batches: how long a prefill takes, and how long a decode step, against what the memory allows.

    python benchmarks/latency.py qwen3-8b [--backend gllm|vllm|transformers] [--batch-sizes 1,8,32,64,128,256]
        [--input-len 32] [--output-len 128] [--repetitions 3] [--out FOLDER]

For each batch size, all prompts there at once: `prefill` is the time to one token each; `step` is the slope between
that and --output-len tokens more, so that starting and ending cost nothing. Medians over the repetitions, after one
that warms up. The bandwidth counts what a step cannot avoid: all weights once (of experts those that uniform routing
would reach), and the keys and values so far; its share is of the copy rate that benchmarks/ceilings.py measured on
this kind of GPU, times their number.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from engines import add_backend_argument, add_engine_arguments, engine_options
from model_folder import model_folder
from record import RESULTS, show_table, slug, where, write_json
from session import add_out, describe, result_file, timed_start
from workloads import random_prompts

from gllm.console.options import whole
from gllm.console.parser import Parser, run
from gllm.console.terminal import say, warn
from gllm.model_shape import load_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines import Engine, EngineOptions

    from gllm.model_shape import ModelShape


def latency(args: argparse.Namespace) -> int:
    """Start the engine, measure every batch size, print a table; the result file is written after each."""
    with model_folder(args.model) as folder:
        options = engine_options(args, str(folder), load_shape(folder))
        check(args, options)
        result = describe("latency", args.backend, options, folder)
        result |= {"input_len": args.input_len, "output_len": args.output_len, "repetitions": args.repetitions}
        file = result_file(args.out, result)
        ceiling = copy_bytes_per_s(result, options.pp * options.tp)
        with timed_start(args.backend, options, result) as engine:
            batches: list[dict[str, Any]] = []
            for size in args.batch_sizes:
                batches.append(measure(engine, options.shape, size, args, ceiling))
                write_json(file, result | {"engine": engine.describe(), "batches": batches})
    show(result, batches)
    say(f"written: {file}")
    return 0


def check(args: argparse.Namespace, options: EngineOptions) -> None:
    """Refuse what the engine could not do at once.

    Raises:
        ValueError: naming the option to change.
    """
    if max(args.batch_sizes) > options.max_num_seqs:
        raise ValueError(f"--batch-sizes has {max(args.batch_sizes)}, more than --max-num-seqs {options.max_num_seqs}")
    longest = args.input_len + args.output_len + 1
    if longest > options.max_model_len:
        raise ValueError(
            f"--input-len and --output-len come to {longest} tokens, the model takes {options.max_model_len}"
        )


def measure(
    engine: Engine, shape: ModelShape, size: int, args: argparse.Namespace, ceiling: float | None
) -> dict[str, Any]:
    """One batch size."""
    first_s, whole_s = [], []
    for repetition in range(args.repetitions + 1):
        prompts = random_prompts(size, args.input_len, vocab_size=shape.vocab_size, seed=repetition)
        one, many = (timed(engine, prompts, count) for count in (1, 1 + args.output_len))
        if repetition:  # the first one warms up
            first_s.append(one)
            whole_s.append(many)
    step_s = (median(whole_s) - median(first_s)) / args.output_len
    context = args.input_len + (1 + args.output_len) / 2  # keys that a step finds, on average
    num_bytes = bytes_per_step(shape, size, context)
    rate = num_bytes / step_s if step_s > 0 else None  # noise, where a step takes next to nothing
    warn(f"batch {size}: prefill {median(first_s) * 1e3:.2f} ms, step {step_s * 1e3:.3f} ms")
    return {
        "batch_size": size,
        "prefill_s": median(first_s),
        "step_s": step_s,
        "output_tokens_per_s": size / step_s if step_s > 0 else None,
        "bytes_per_step": num_bytes,
        "bytes_per_s": rate,
        "share_of_copy": rate / ceiling if rate and ceiling else None,
        "all_prefill_s": first_s,
        "all_whole_s": whole_s,
    }


def timed(engine: Engine, prompts: list[list[int]], num_outputs: int) -> float:
    """Seconds to answer all prompts with so many tokens."""
    started = time.perf_counter()
    counts = engine.generate(prompts, [num_outputs] * len(prompts))
    seconds = time.perf_counter() - started
    assert counts == [num_outputs] * len(prompts), "an answer is not as long as it was asked to be"
    return seconds


def bytes_per_step(shape: ModelShape, batch_size: int, context: float) -> float:
    """What a decode step must read: weights, the embedding table but for its use as the head left out, and KV cache.

    Args:
        shape: of the model.
        batch_size: sequences that decode.
        context: keys of each, on average.
    """
    weights = shape.embedding_params + shape.hidden_size  # the head, tied or not, and the last norm
    for layer in range(shape.num_layers):
        weights += shape.layer_params(layer)
        if layer in shape.moe_layers:
            missed = (1 - shape.num_experts_per_token / shape.num_experts) ** batch_size
            weights -= shape.num_experts * missed * shape.expert_params
    return weights * shape.dtype_bytes + batch_size * context * shape.kv_bytes_per_token * shape.num_layers


def copy_bytes_per_s(result: dict[str, Any], num_gpus: int) -> float | None:
    """What the GPUs can move together, by results/ceilings_GPU.json; None where that was not measured."""
    cards = result["machine"].get("gpus")
    file = RESULTS / f"ceilings_{slug(cards[0]['name'])}.json" if cards else None
    if file is None or not file.is_file():
        return None
    return float(json.loads(file.read_text(encoding="utf-8"))["copy_tb_per_s"]) * 1e12 * num_gpus


def show(result: dict[str, Any], batches: Sequence[dict[str, Any]]) -> None:
    """The table."""
    say(f"{result['model']}, {result['backend']}, {where(result)}; first answer after {result['start_s']} s")
    header = ["batch", "prefill ms", "step ms", "output tok/s", "GB/step", "TB/s", "of copy"]
    rows = [
        [
            batch["batch_size"],
            f"{batch['prefill_s'] * 1e3:.2f}",
            f"{batch['step_s'] * 1e3:.3f}",
            _number(batch["output_tokens_per_s"], ",.0f"),
            f"{batch['bytes_per_step'] / 1e9:.2f}",
            _number(batch["bytes_per_s"] and batch["bytes_per_s"] / 1e12, ".3f"),
            _number(batch["share_of_copy"], ".1%"),
        ]
        for batch in batches
    ]
    show_table(header, rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def sizes(text: str) -> tuple[int, ...]:
    """`1,8,32`."""
    return tuple(map(whole(1), text.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_engine_arguments(parser, policy="sarathi")
    add_backend_argument(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch-sizes", type=sizes, default=(1, 8, 32, 64, 128, 256), metavar="N,N", help="default: 1,8,32,64,128,256"
    )
    group.add_argument("--input-len", type=whole(1), default=32, metavar="N", help="of each prompt (default: 32)")
    group.add_argument("--output-len", type=whole(1), default=128, metavar="N", help="decode steps (default: 128)")
    group.add_argument("--repetitions", type=whole(1), default=3, metavar="N", help="after a warm-up (default: 3)")
    add_out(group)
    parser.set_defaults(command=latency)
    return run(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
