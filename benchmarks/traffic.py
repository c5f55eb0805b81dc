"""What a server is asked and when: random lengths or a trace's, at a request rate or at the trace's own times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from gllm.console.options import positive, whole
from gllm.runtime.prompts import synthesise
from gllm.trace import TraceRequest, load_trace

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

NUM_PROMPTS = 1000
NS_PER_S = 1e9
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
"""For endpoints that take text alone: each is a token in most vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    at_s: float  # after the start
    prompt: list[int]
    num_outputs: int


def add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    """Which requests, and when."""
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--num-prompts", type=whole(1), metavar="N", help=f"default: {NUM_PROMPTS:,}, or the whole trace"
    )
    group.add_argument("--random-input-len", type=whole(1), default=1024, metavar="N", help="default: 1024")
    group.add_argument("--random-output-len", type=whole(1), default=128, metavar="N", help="default: 128")
    group.add_argument(
        "--random-range-ratio",
        type=fraction,
        default=0.0,
        metavar="R",
        help="lengths uniform from (1-R) to (1+R) times that (default: 0)",
    )
    group.add_argument("--trace", metavar="TRACE", help="its lengths instead: a file, or a sample's name")
    group.add_argument("--trace-times", action="store_true", help="its arrival times too, in place of --request-rate")
    group.add_argument(
        "--rate-scale", type=positive, default=1.0, metavar="X", help="the trace's times X times as fast"
    )
    group.add_argument("--max-total-tokens", type=whole(2), metavar="N", help="clip each request of the trace")
    group.add_argument(
        "--vocab-size", type=whole(2), default=10_000, metavar="N", help="token ids are below it (default: 10,000)"
    )
    group.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of lengths, tokens and times (default: 0)"
    )
    group = parser.add_argument_group("load")
    group.add_argument("--request-rate", type=rate, default=math.inf, metavar="R", help="per second (default: inf)")
    group.add_argument(
        "--burstiness", type=positive, default=1.0, metavar="B", help="shape of gamma gaps; 1: Poisson, less: burstier"
    )
    group.add_argument("--max-concurrency", type=whole(1), metavar="N", help="requests at once (default: no limit)")


def rate(text: str) -> float:
    """A number above zero, or `inf`."""
    return math.inf if text.lower() in ("inf", "infinity") else positive(text)


def fraction(text: str) -> float:
    """From 0 to below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise ValueError
    return number


def plan(args: argparse.Namespace) -> list[Ask]:
    """All requests in order of their times.

    Raises:
        ValueError: the trace cannot be read, or options contradict each other.
    """
    if args.trace is None and args.trace_times:
        raise ValueError("--trace-times needs a --trace")
    rows = list(random_rows(args)) if args.trace is None else trace_rows(args)
    times = (
        [(row.arrival_ns or 0) / NS_PER_S for row in rows]
        if args.trace_times
        else drawn_times(len(rows), args.request_rate, args.burstiness, args.seed)
    )
    prompts = (synthesise(row, args.seed * len(rows) + number, args.vocab_size) for number, row in enumerate(rows))
    return [
        Ask(at_s=at_s, prompt=prompt, num_outputs=row.num_output_tokens)
        for at_s, prompt, row in zip(times, prompts, rows, strict=True)
    ]


def random_rows(args: argparse.Namespace) -> Iterator[TraceRequest]:
    """Uniform lengths around the ones asked for."""
    random = Random(args.seed)

    def length(middle: int) -> int:
        spread = args.random_range_ratio * middle
        return random.randint(max(1, math.floor(middle - spread)), math.ceil(middle + spread))

    for _ in range(args.num_prompts or NUM_PROMPTS):
        yield TraceRequest(
            arrival_ns=0,
            num_prompt_tokens=length(args.random_input_len),
            num_output_tokens=length(args.random_output_len),
        )


def trace_rows(args: argparse.Namespace) -> Sequence[TraceRequest]:
    """The first rows of a trace; prompts share what its block hashes say."""
    return load_trace(
        args.trace,
        limit=args.num_prompts,
        rate_scale=args.rate_scale,
        arrivals=None if args.trace_times else "burst",
        max_total_tokens=args.max_total_tokens,
    ).requests


def drawn_times(count: int, rate_per_s: float, burstiness: float, seed: int) -> list[float]:
    """Arrivals with gamma gaps of mean 1 / rate; all at 0 where the rate is infinite."""
    random, now_s, times = Random(seed), 0.0, []
    for _ in range(count):
        times.append(now_s)
        now_s += random.gammavariate(burstiness, 1 / burstiness) / rate_per_s
    return times


def body_of(ask: Ask, args: argparse.Namespace) -> dict[str, Any]:
    """The request's JSON: token ids for completions, words for chat, which takes no ids."""
    body: dict[str, Any] = {
        "model": args.model,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.endpoint == "completions":
        body |= {"prompt": ask.prompt, "max_tokens": ask.num_outputs}
    else:
        text = " ".join(WORDS[token_id % len(WORDS)] for token_id in ask.prompt)
        body |= {"messages": [{"role": "user", "content": text}], "max_completion_tokens": ask.num_outputs}
    return body | ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body
