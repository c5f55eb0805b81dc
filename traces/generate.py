"""Generates traces: chats that share system prompts and grow turn by turn, from a seed alone.

`python -m gllm_traces.generate chat --requests 200 --rate 4 --out my.jsonl` writes one;
`--samples` rewrites the shipped ones. Lengths are lognormal, starts of chats a renewal process
with gamma gaps. Times are whole milliseconds, so that no platform's last bit of a logarithm shows.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from gllm.trace import TraceError, TraceRequest, trace_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK_SIZE = 16  # tokens
NS_PER_MS = 1_000_000
SAMPLES = Path(__file__).parent / "samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lognormal numbers of tokens, from 1 to `cap`."""

    median: float
    sigma: float  # of the logarithm
    cap: int

    def draw(self, rng: Random) -> int:
        """One length."""
        return max(1, min(self.cap, round(self.median * math.exp(self.sigma * rng.normalvariate()))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """A class of service: its share of the chats, its priority and how long it waits for a first token."""

    share: float
    priority: int = 0
    first_token_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a generated trace is like."""

    description: str
    num_requests: int
    rate_per_s: float  # of requests, once the first chats are at their later turns
    cv: float  # of the gaps between chats; 1 is Poisson
    system: Lengths
    num_systems: int  # system prompts; the n-th most popular has 1/n of the first one's chats
    message: Lengths
    output: Lengths
    mean_turns: float  # turns of a chat are geometric
    think_s: float = 15.0  # mean pause between an answer and the next message
    output_per_s: float = 40.0  # tokens; how fast an answer is assumed to come
    max_prompt: int = 16_384  # a chat ends before it grows longer
    classes: tuple[Class, ...] = (Class(share=1.0),)
    seed: int = 0


WORKLOADS: dict[str, Workload] = {
    "chat": Workload(
        description="Multi-turn chats that share system prompts: many prefix hits, Poisson starts",
        num_requests=1000,
        rate_per_s=1.8,
        cv=1.0,
        system=Lengths(median=300, sigma=0.8, cap=2000),
        num_systems=8,
        message=Lengths(median=60, sigma=1.2, cap=4000),
        output=Lengths(median=180, sigma=0.9, cap=2000),
        mean_turns=3.5,
        seed=1,
    ),
    "code": Workload(
        description="Code completion: bursts of long prompts over a few shared contexts, short outputs",
        num_requests=800,
        rate_per_s=3.0,
        cv=6.0,
        system=Lengths(median=500, sigma=0.5, cap=2000),
        num_systems=24,
        message=Lengths(median=1100, sigma=0.9, cap=7000),
        output=Lengths(median=18, sigma=0.9, cap=500),
        mean_turns=1.5,
        think_s=6.0,
        seed=2,
    ),
    "mixed-priority": Workload(
        description="Interactive, ordinary and batch requests with priorities and first-token deadlines",
        num_requests=400,
        rate_per_s=4.0,
        cv=2.0,
        system=Lengths(median=150, sigma=0.6, cap=1000),
        num_systems=4,
        message=Lengths(median=300, sigma=1.2, cap=8000),
        output=Lengths(median=150, sigma=0.9, cap=1500),
        mean_turns=2.0,
        classes=(
            Class(share=0.4, priority=0, first_token_ms=500),
            Class(share=0.4, priority=1, first_token_ms=3000),
            Class(share=0.2, priority=2),
        ),
        seed=3,
    ),
}


def generate(workload: Workload) -> list[TraceRequest]:
    """The workload's requests in order of arrival, the first at 0; the same for the same value."""
    rng = Random(workload.seed)
    ids = count()
    systems = [_system(workload, rng, ids) for _ in range(workload.num_systems)]
    requests: list[TraceRequest] = []
    # As many chats as requests: whichever come first, none of their elders is missing.
    for start_s in _starts(workload, rng):
        system = rng.choices(systems, [1 / n for n in range(1, workload.num_systems + 1)])[0]
        requests += _chat(workload, rng, ids, start_s, system)
    first = sorted(requests, key=lambda request: request.arrival_ns or 0)[: workload.num_requests]
    return [_shifted(request, first[0].arrival_ns or 0) for request in first]


def _starts(workload: Workload, rng: Random) -> Iterator[float]:
    """When chats start, in s."""
    shape = workload.cv**-2
    scale = workload.mean_turns / workload.rate_per_s / shape
    start_s = 0.0
    for _ in range(workload.num_requests):
        yield start_s
        start_s += rng.gammavariate(shape, scale)


def _system(workload: Workload, rng: Random, ids: Iterator[int]) -> tuple[int, tuple[int, ...]]:
    """A system prompt: its tokens and the ids of its full blocks."""
    num_tokens = workload.system.draw(rng)
    return num_tokens, _grown((), num_tokens, ids)


def _grown(blocks: tuple[int, ...], num_tokens: int, ids: Iterator[int]) -> tuple[int, ...]:
    """The ids of the full blocks of `num_tokens`: those there are, then new ones."""
    return blocks + tuple(next(ids) for _ in range(num_tokens // BLOCK_SIZE - len(blocks)))


def _chat(
    workload: Workload, rng: Random, ids: Iterator[int], start_s: float, system: tuple[int, tuple[int, ...]]
) -> Iterator[TraceRequest]:
    """One chat, turn by turn: each prompt is the last one, its answer and a new message."""
    service = rng.choices(workload.classes, [c.share for c in workload.classes])[0]
    context, blocks = system
    while (prompt := context + workload.message.draw(rng)) <= workload.max_prompt:
        output = workload.output.draw(rng)
        blocks = _grown(blocks, prompt, ids)
        yield _request(service, round(start_s * 1000), prompt, output, blocks)
        if rng.random() * workload.mean_turns < 1:
            return
        context = prompt + output
        start_s += output / workload.output_per_s + rng.expovariate(1 / workload.think_s)


def _request(service: Class, arrival_ms: int, prompt: int, output: int, blocks: tuple[int, ...]) -> TraceRequest:
    wait_ms = service.first_token_ms
    return TraceRequest(
        arrival_ns=arrival_ms * NS_PER_MS,
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        hash_ids=blocks,
        hash_block_size=BLOCK_SIZE,
        priority=service.priority,
        deadline_ns=None if wait_ms is None else (arrival_ms + wait_ms) * NS_PER_MS,
    )


def _shifted(request: TraceRequest, by_ns: int) -> TraceRequest:
    deadline_ns = None if request.deadline_ns is None else request.deadline_ns - by_ns
    return replace(request, arrival_ns=(request.arrival_ns or 0) - by_ns, deadline_ns=deadline_ns)


def text(name: str, workload: Workload) -> str:
    """The whole file, in gLLM's own format (SCHEMA.md)."""
    lines = trace_lines(generate(workload), name=name, description=workload.description)
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    if options.samples:
        for name, workload in WORKLOADS.items():
            _write(SAMPLES / f"{name}.jsonl", text(name, workload))
        return 0
    chosen = {"num_requests": options.requests, "rate_per_s": options.rate, "cv": options.cv, "seed": options.seed}
    given = {key: value for key, value in chosen.items() if value is not None}
    try:
        _write(options.out, text(options.name, replace(WORKLOADS[options.name], **given)))
    except (TraceError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _write(path: Path | None, data: str) -> None:
    if path is None:
        sys.stdout.write(data)
    else:
        path.write_bytes(data.encode())  # the same line ends everywhere


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gllm_traces.generate", description="Generates a synthetic trace.")
    known = "; ".join(f"{name}: {workload.description}" for name, workload in WORKLOADS.items())
    parser.add_argument("name", nargs="?", default="chat", choices=WORKLOADS, help=known)
    parser.add_argument("--requests", type=_count, help="how many")
    parser.add_argument("--rate", type=_positive, help="requests/s")
    parser.add_argument("--cv", type=_positive, help="variation of the gaps between chats; 1 is Poisson")
    parser.add_argument("--seed", type=int, help="same seed, same file")
    parser.add_argument("--out", type=Path, help="file to write; standard output if left out")
    parser.add_argument("--samples", action="store_true", help="rewrite the shipped samples instead")
    return parser


def _count(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(value)


def _positive(value: str) -> float:
    number = float(value)
    if not 0.01 <= number <= 1e6:
        raise argparse.ArgumentTypeError("must be between 0.01 and 1000000")
    return number


if __name__ == "__main__":
    sys.exit(main())
