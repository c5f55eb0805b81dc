"""Load a server that speaks OpenAI's protocol, and tell how its answers came: TTFT, TPOT, ITL, E2EL, throughput.

    python benchmarks/serving.py --base-url http://127.0.0.1:8000 --model NAME
        [--random-input-len 1024 --random-output-len 128 | --trace chat] [--request-rate inf] [--max-concurrency N]
        [--num-prompts 1000] [--goodput ttft:500 tpot:50] [--ignore-eos] [--save-result [FILE]]

Options, figures and the names in the result file are those that vLLM's users know. TTFT: from sending a request to its
first text. TPOT: from there to the end, per token after the first. ITL: between two events of one answer. E2EL: from
sending to the end. Tokens are counted by the server (usage), events where it does not say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openai_stream import Pool, endpoint_of, first_model, run_loop
from record import OUT, describe_run, slug, write_json
from traffic import add_traffic_arguments, body_of, plan

from gllm.console.errors import CommandError
from gllm.console.options import positive, whole
from gllm.console.parser import FAILED, Parser, run
from gllm.console.progress import show_progress
from gllm.console.terminal import say, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai_stream import Answer
    from traffic import Ask

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
LABEL_WIDTH, BLOCK_WIDTH = 40, 50
NO_TEXT = """the server sends no text, as of a model without a tokenizer, so that a first token shows only at the end;
--extra-body '{"logprobs": 0}' lets gLLM's completions tell of each"""


def serving(args: argparse.Namespace) -> int:
    """Ask everything, print the figures; return the exit status."""
    endpoint = endpoint_of(args.base_url, args.api_key)
    asks = plan(args)
    args.model = args.model or first_model(endpoint)
    allow_many_files()
    load = Load(args=args, pool=Pool(endpoint, timeout_s=args.timeout), asks=asks)
    with contextlib.nullcontext() if args.quiet else show_progress(len(asks), lambda: load.num_done, doing="asking"):
        run_loop(load.run())
    result = summarize(load)
    show(result, args)
    if args.save_result is not None:
        file = args.save_result if args.save_result.name else OUT / result_name(args)
        write_json(file, result)
        say(f"written: {file}")
    return FAILED if result["failed"] == len(asks) else 0


def result_name(args: argparse.Namespace) -> str:
    """`serving_MODEL_TIME.json`."""
    return f"{slug('serving', args.model, datetime.now(UTC).strftime('%Y%m%dT%H%M%S'))}.json"


def allow_many_files() -> None:
    """Let every request have a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclass(slots=True)
class Load:
    """The requests of one benchmark, sent when they are due."""

    args: argparse.Namespace
    pool: Pool
    asks: Sequence[Ask]
    answers: list[Answer] = field(default_factory=list)  # in the order they ended
    duration_s: float = 0.0
    num_done: int = 0
    num_now: int = 0
    peak: int = 0  # of requests at once

    async def run(self) -> None:
        """Warm up, then ask everything.

        Raises:
            CommandError: the warm-up failed.
        """
        for _ in range(self.args.num_warmups):
            backwards = replace(self.asks[0], prompt=self.asks[0].prompt[::-1])  # or a prefix cache would know it
            answer = await self._stream(backwards)
            if answer.error is not None:
                raise CommandError(f"{self.args.base_url}: the first request failed: {answer.error}")
            if answer.num_output_tokens > 1 and not answer.token_s:
                warn(NO_TEXT)
        gate = asyncio.Semaphore(self.args.max_concurrency or len(self.asks))
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for ask in self.asks:
                wait_s = start_s + ask.at_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                tasks.create_task(self._ask(ask, gate))
        self.duration_s = time.perf_counter() - start_s
        self.pool.close()

    async def _ask(self, ask: Ask, gate: asyncio.Semaphore) -> None:
        async with gate:
            self.num_now += 1
            self.peak = max(self.peak, self.num_now)
            answer = await self._stream(ask)
            self.num_now -= 1
        self.num_done += 1
        self.answers.append(answer)

    async def _stream(self, ask: Ask) -> Answer:
        answer = await self.pool.stream(PATHS[self.args.endpoint], body_of(ask, self.args))
        if answer.num_prompt_tokens is None:
            answer.num_prompt_tokens = len(ask.prompt)
        return answer


def summarize(load: Load) -> dict[str, Any]:
    """All figures as JSON values."""
    args, good = load.args, [answer for answer in load.answers if answer.error is None]
    num_in, num_out = sum(each.num_prompt_tokens or 0 for each in good), sum(each.num_output_tokens for each in good)
    errors = Counter(answer.error for answer in load.answers if answer.error is not None)
    seconds = load.duration_s
    result = {
        **describe_run(()),
        "base_url": args.base_url,
        "endpoint": args.endpoint,
        "model_id": args.model,
        "num_prompts": len(load.asks),
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "trace": args.trace,
        "duration": seconds,
        "completed": len(good),
        "failed": len(load.asks) - len(good),
        "errors": dict(errors.most_common(5)),
        "max_concurrent_requests": load.peak,
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": sum(each.num_cached_tokens or 0 for each in good),
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(meets(each, args.goodput) for each in good) / seconds if args.goodput else None,
        "output_throughput": num_out / seconds,
        "total_token_throughput": (num_in + num_out) / seconds,
    }
    columns = latencies_ms(good)
    for metric in METRICS:
        result |= statistics(metric, columns[metric], args.metric_percentiles)
    return result | ({"requests": [details(answer) for answer in load.answers]} if args.save_detailed else {})


def latencies_ms(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The values of each metric in milliseconds."""
    gaps = [later - earlier for each in answers for earlier, later in zip(each.token_s, each.token_s[1:], strict=False)]
    seconds = {
        "ttft": [each.ttft_s for each in answers],
        "tpot": [each.tpot_s for each in answers if each.tpot_s is not None],
        "itl": gaps,
        "e2el": [each.e2e_s for each in answers],
    }
    return {metric: [value * 1e3 for value in values] for metric, values in seconds.items()}


def statistics(metric: str, values_ms: list[float], percents: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, deviation and percentiles of one metric, under vLLM's names; None where there is no value."""
    names = [f"mean_{metric}_ms", f"median_{metric}_ms", f"std_{metric}_ms"]
    names += [f"p{percent:g}_{metric}_ms" for percent in percents]
    if not values_ms:
        return dict.fromkeys(names)
    column = np.asarray(values_ms)
    figures = [column.mean(), np.median(column), column.std(), *np.percentile(column, percents)]
    return dict(zip(names, map(float, figures), strict=True))


def meets(answer: Answer, goodput: Sequence[tuple[str, float]]) -> bool:
    """Whether an answer keeps within all objectives; one token has no TPOT and keeps within that."""
    values = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.e2e_s}
    return all(values[name] * 1e3 <= limit_ms for name, limit_ms in goodput)


def details(answer: Answer) -> dict[str, Any]:
    """One request, for --save-detailed."""
    return {
        "input_tokens": answer.num_prompt_tokens,
        "output_tokens": answer.num_output_tokens,
        "ttft_ms": answer.ttft_s * 1e3 if answer.error is None else None,
        "e2el_ms": answer.e2e_s * 1e3 if answer.error is None else None,
        "error": answer.error,
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The block of figures."""
    say(" Serving Benchmark Result ".center(BLOCK_WIDTH, "="))
    line("Successful requests:", result["completed"])
    line("Failed requests:", result["failed"])
    if args.max_concurrency is not None:
        line("Maximum request concurrency:", args.max_concurrency)
    if not math.isinf(args.request_rate):
        line("Request rate configured (RPS):", args.request_rate)
    line("Benchmark duration (s):", result["duration"])
    line("Total input tokens:", result["total_input_tokens"])
    if result["total_cached_tokens"]:  # the same prompts were there before
        line("Of these found in a cache:", result["total_cached_tokens"])
    line("Total generated tokens:", result["total_output_tokens"])
    line("Request throughput (req/s):", result["request_throughput"])
    if args.goodput:
        line("Request goodput (req/s):", result["request_goodput"])
    line("Output token throughput (tok/s):", result["output_throughput"])
    line("Peak concurrent requests:", result["max_concurrent_requests"])
    line("Total token throughput (tok/s):", result["total_token_throughput"])
    for metric in args.percentile_metrics:
        say(METRICS[metric].center(BLOCK_WIDTH, "-"))
        name = metric.upper()
        line(f"Mean {name} (ms):", result[f"mean_{metric}_ms"])
        line(f"Median {name} (ms):", result[f"median_{metric}_ms"])
        for percent in args.metric_percentiles:
            line(f"P{percent:g} {name} (ms):", result[f"p{percent:g}_{metric}_ms"])
    say("=" * BLOCK_WIDTH)
    for error, count in list(result["errors"].items())[:1]:
        warn(f"{result['failed']:,} of {result['num_prompts']:,} requests failed; {count:,} of them: {error}")


def line(label: str, value: float | None) -> None:
    """One figure."""
    text = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    say(f"{label:<{LABEL_WIDTH}}{text:<10}".rstrip())


def objective(text: str) -> tuple[str, float]:
    """`ttft:500`, in milliseconds."""
    name, _, limit = text.partition(":")
    name = {"e2e": "e2el"}.get(name, name)
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text!r}: give ttft:MS, tpot:MS or e2el:MS")
    return name, positive(limit)


def metrics(text: str) -> tuple[str, ...]:
    """`ttft,tpot`."""
    names = tuple(text.split(","))
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def percents(text: str) -> tuple[float, ...]:
    """`50,90,99`."""
    found = tuple(map(positive, text.split(",")))
    if max(found) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} has more than 100")
    return found


def json_object(text: str) -> dict[str, Any]:
    """`{"top_k": 20}`."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: http://127.0.0.1:8000"
    )
    group.add_argument("--model", metavar="NAME", help="as the server knows it; default: the first that it names")
    group.add_argument("--endpoint", choices=tuple(PATHS), default="completions", help="default: completions")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY")
    group.add_argument("--timeout", type=positive, default=3600.0, metavar="S", help="of a request (default: 3600)")
    add_traffic_arguments(parser)
    group = parser.add_argument_group("answers")
    group.add_argument("--ignore-eos", action="store_true", help="every answer as long as it may be")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    group.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of each request")
    group = parser.add_argument_group("figures")
    group.add_argument("--num-warmups", type=whole(0), default=1, metavar="N", help="requests before (default: 1)")
    group.add_argument("--goodput", type=objective, nargs="+", metavar="NAME:MS", help="objectives: ttft:500 tpot:50")
    group.add_argument(
        "--percentile-metrics",
        type=metrics,
        default=tuple(METRICS),
        metavar="M,M",
        help=f"default: {','.join(METRICS)}",
    )
    group.add_argument(
        "--metric-percentiles", type=percents, default=(50.0, 90.0, 99.0), metavar="P,P", help="default: 50,90,99"
    )
    group.add_argument(
        "--save-result", type=Path, nargs="?", const=Path(), metavar="FILE", help=f"as JSON; default: in {OUT}"
    )
    group.add_argument("--save-detailed", action="store_true", help="each request in it too")
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(command=serving)
    return run(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
