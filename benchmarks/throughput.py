"""Offline throughput: a whole workload at once, as many tokens a second as the engine gives.

    python benchmarks/throughput.py qwen3-8b [--backend gllm|vllm|transformers] [--workload nano256,chat1024]
        [--repetitions 2] [--pp N] [--tp N] [--ep N] [--policy P] [--out FOLDER]

Random weights, bfloat16, no prefix cache, temperature 0.6, end-of-sequence tokens ignored, model length 4096: the
same for every engine. The first repetition warms up. Start-up is the time from nothing loaded to the answer to a
first request of one token. One engine a process: before the next one on the same GPUs wait until this one has ended.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from engines import add_backend_argument, add_engine_arguments, engine_options
from model_folder import model_folder
from record import show_table, where, write_json
from session import add_out, describe, result_file, timed_start
from workloads import make_workload

from gllm.console.options import positive, whole
from gllm.console.parser import Parser, run
from gllm.console.terminal import say, warn
from gllm.model_shape import load_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines import Engine, EngineOptions
    from workloads import Workload


def throughput(args: argparse.Namespace) -> int:
    """Start the engine, run every workload, print a table; the result file is written after each repetition."""
    with model_folder(args.model) as folder:
        shape = load_shape(folder)
        workloads = [
            make_workload(name, scale=args.scale, vocab_size=shape.vocab_size) for name in args.workload.split(",")
        ]
        options = engine_options(args, str(folder), shape)
        check_lengths(workloads, options)
        result = describe("throughput", args.backend, options, folder)
        file = result_file(args.out, result)
        with timed_start(args.backend, options, result) as engine:
            runs: list[dict[str, Any]] = []
            for workload in workloads:
                for repetition in range(args.repetitions):
                    runs.append(measure(engine, workload, repetition))
                    write_json(file, result | {"engine": engine.describe(), "runs": runs})
    show(result, runs)
    say(f"written: {file}")
    return 0


def check_lengths(workloads: Sequence[Workload], options: EngineOptions) -> None:
    """Refuse what the model is too short for.

    Raises:
        ValueError: naming the workload.
    """
    for workload in workloads:
        if workload.longest > options.max_model_len:
            raise ValueError(
                f"--workload {workload.name} has a request of {workload.longest} tokens, "
                f"the model takes {options.max_model_len}; give a --scale below 1 or another model"
            )


def measure(engine: Engine, workload: Workload, repetition: int) -> dict[str, Any]:
    """One run of a workload."""
    started = time.perf_counter()
    counts = engine.generate(workload.prompts, workload.num_outputs)
    seconds = time.perf_counter() - started
    assert counts == workload.num_outputs, "an answer is not as long as it was asked to be"
    num_in, num_out = workload.num_input_tokens, workload.num_output_tokens
    warn(f"{workload.name} {repetition}: {seconds:.2f} s, {num_out / seconds:,.0f} output tok/s")
    return {
        "workload": workload.name,
        "repetition": repetition,
        "num_requests": len(counts),
        "seconds": round(seconds, 4),
        "num_input_tokens": num_in,
        "num_output_tokens": num_out,
        "output_tokens_per_s": round(num_out / seconds, 1),
        "total_tokens_per_s": round((num_in + num_out) / seconds, 1),
    }


def show(result: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """The table."""
    say(f"{result['model']}, {result['backend']}, {where(result)}; first answer after {result['start_s']} s")
    header = ["workload", "repetition", "seconds", "tokens in", "tokens out", "output tok/s", "total tok/s"]
    rows = [
        [
            run["workload"],
            run["repetition"],
            f"{run['seconds']:.2f}",
            f"{run['num_input_tokens']:,}",
            f"{run['num_output_tokens']:,}",
            f"{run['output_tokens_per_s']:,.0f}",
            f"{run['total_tokens_per_s']:,.0f}",
        ]
        for run in runs
    ]
    show_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_engine_arguments(parser, policy="throttle")
    add_backend_argument(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--workload", default="nano256,chat1024", metavar="W,W", help="default: nano256,chat1024")
    group.add_argument("--scale", type=positive, default=1.0, metavar="X", help="lengths X times as long (default: 1)")
    group.add_argument("--repetitions", type=whole(1), default=2, metavar="N", help="of each workload (default: 2)")
    add_out(group)
    parser.set_defaults(command=throughput)
    return run(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
