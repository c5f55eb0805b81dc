"""Options that commands of both shells share, and the values they make. Importing this imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.parallel import Parallel
    from gllm.trace import TraceOptions

MOST = 100_000_000
"""The largest count taken: beyond it are typing errors, and more memory than there is."""


def whole(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low} and at most {MOST:,}")
        return number

    return parse


def positive(text: str) -> float:
    """A finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return number


def share(text: str) -> float:
    """A number above zero, at most 1."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1, the whole")
    return number


def layer_counts(text: str) -> tuple[int, ...]:
    """`16,16,17,15`."""
    return tuple(map(whole(1), text.split(",")))


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """TRACE and how to bend it."""
    parser.add_argument(
        "trace", metavar="TRACE", help="a file (zipped or not), - for standard input, or a sample's name"
    )
    group = parser.add_argument_group("trace")
    group.add_argument("--format", help="the file's format; default: told from its first line")
    group.add_argument("--rate-scale", type=positive, default=1.0, metavar="X", help="arrivals X times as fast")
    group.add_argument("--window", metavar="START:END", help="only requests that arrive then, in seconds")
    group.add_argument("--limit", type=whole(1), metavar="ROWS", help="only the first rows, cut before --window")
    group.add_argument(
        "--repeat", type=whole(0), default=1, metavar="N", help="the rows N times over; 0: up to --limit"
    )
    group.add_argument("--arrivals", metavar="PROCESS", help="draw times: poisson:RATE, gamma:RATE:CV or burst")
    group.add_argument("--max-total-tokens", type=whole(2), metavar="N", help="clip each request to N tokens")
    group.add_argument("--seed", type=int, default=0, help="of drawn times (default: 0)")


def add_parallel_options(group: argparse._ArgumentGroup, default_pp: int) -> None:
    """How the model is spread over GPUs; vLLM's spellings are understood too."""
    group.add_argument(
        "--pp",
        "-pp",
        "--pipeline-parallel-size",
        type=whole(1),
        metavar="N",
        help=f"stages (default: {default_pp}, or as --pp-layers)",
    )
    group.add_argument(
        "--tp", "-tp", "--tensor-parallel-size", type=whole(1), default=1, metavar="N", help="GPUs a stage (default: 1)"
    )
    group.add_argument(
        "--ep", type=whole(1), default=1, metavar="N", help="groups of GPUs that share a stage's experts (default: 1)"
    )
    group.add_argument(
        "--pp-layers", type=layer_counts, metavar="16,16,17,15", help="layers of each stage; default: balanced"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="of each GPU's memory (default: 0.9)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The engine's limits."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-num-seqs", type=whole(1), default=1024, metavar="N", help="sequences at once (default: 1024)"
    )
    group.add_argument(
        "--block-size", type=whole(1), default=16, metavar="N", help="tokens in a cache block (default: 16)"
    )
    group.add_argument(
        "--max-model-len", type=whole(2), metavar="N", help="prompt and output tokens; default: the model's"
    )
    group.add_argument("--num-blocks", type=whole(1), metavar="N", help="cache blocks; default: what the memory holds")
    group.add_argument(
        "--max-in-flight",
        type=whole(0),
        default=0,
        metavar="N",
        help="micro-batches on the road; default: one a stage and one planned ahead",
    )
    group.add_argument(
        "--prefix-caching",
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on by default",
    )


def add_slo_options(parser: argparse.ArgumentParser) -> None:
    """What the report measures goodput by."""
    group = parser.add_argument_group("objectives")
    group.add_argument("--slo-ttft", type=positive, metavar="S", help="objective for the time to the first token")
    group.add_argument("--slo-tpot", type=positive, metavar="S", help="objective for the time per output token")


def trace_options(args: argparse.Namespace) -> TraceOptions:
    """The trace that a command line asks for."""
    from gllm.trace import TraceOptions  # noqa: PLC0415 - --help must not wait for it

    return TraceOptions(
        source=args.trace,
        format=args.format,
        rate_scale=args.rate_scale,
        window=args.window,
        limit=args.limit,
        repeat=args.repeat,
        arrivals=args.arrivals,
        seed=args.seed,
        max_total_tokens=args.max_total_tokens,
    )


def parallel_options(args: argparse.Namespace, default_pp: int) -> Parallel:
    """The split over GPUs that a command line asks for."""
    from gllm.parallel import Parallel  # noqa: PLC0415

    return Parallel(
        pp=args.pp or len(args.pp_layers or ()) or default_pp, tp=args.tp, ep=args.ep, pp_layers=args.pp_layers
    )
