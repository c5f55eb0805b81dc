"""What a prefix cache is worth: many users who share a system prompt, each in a conversation of many rounds.

    python benchmarks/prefix.py qwen3-8b [--users 32] [--rounds 6] [--system-len 1024] [--message-len 64]
        [--answer-len 128] [--out FOLDER]
    python benchmarks/prefix.py NAME --base-url http://127.0.0.1:8000

In each round every user sends all that was said so far and a new message, all users at once; the next round begins
when all answers are there. Offline, one engine has its prefix cache on, the next one off, and the answers are part of
what was said. A server's cache cannot be switched off from here: in its place every prompt gets a beginning of its
own. A server answers in text, so that random tokens stand for its answers in what was said. Greedy, end-of-sequence
tokens ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from engines import add_engine_arguments, engine_options
from model_folder import model_folder
from openai_stream import Pool, endpoint_of, first_model, run_loop
from record import describe_run, show_table, slug, where, write_json
from session import add_out, describe, result_file

from gllm.console.errors import CommandError
from gllm.console.options import whole
from gllm.console.parser import Parser, run
from gllm.console.terminal import say, warn
from gllm.model_shape import load_shape

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from engines import EngineOptions
    from openai_stream import Endpoint

    from gllm.runtime.async_engine import AsyncEngine

    Asked = Callable[[list[int], int], Awaitable["Reply"]]
    """Answers a prompt with so many tokens."""

TIMEOUT_S = 3600.0


class Reply(NamedTuple):
    """How one request went."""

    ttft_s: float
    e2e_s: float
    num_prompt_tokens: int
    num_cached_tokens: int | None  # None: nobody says
    token_ids: list[int] | None  # None: only as text


@dataclass(slots=True)
class User:
    """One user's conversation so far."""

    said: list[int]
    random: Random
    vocab_size: int

    def says(self, num_tokens: int) -> list[int]:
        """New tokens, added to the conversation; all of it."""
        self.said += _draw(self.random, num_tokens, self.vocab_size)
        return list(self.said)

    def hears(self, reply: Reply, num_tokens: int) -> None:
        """The answer belongs to what was said."""
        self.said += reply.token_ids or _draw(self.random, num_tokens, self.vocab_size)


def _draw(random: Random, count: int, vocab_size: int) -> list[int]:
    return [random.randrange(vocab_size) for _ in range(count)]


async def talk(asked: Asked, args: argparse.Namespace, vocab_size: int, *, cold: bool) -> dict[str, Any]:
    """Let all users talk; the measures of each round and of all.

    Args:
        asked: who answers.
        args: lengths and numbers.
        vocab_size: token ids are below it.
        cold: every prompt begins as no other does.
    """
    system = _draw(Random(args.seed), args.system_len, vocab_size)
    users = [User(list(system), Random(f"{args.seed} {number}"), vocab_size) for number in range(args.users)]
    num_asked = 0
    rounds, started = [], time.perf_counter()
    for number in range(args.rounds):
        prompts = [user.says(args.message_len) for user in users]
        for prompt in prompts if cold else ():
            prompt[:3] = beginning(num_asked, vocab_size)
            num_asked += 1
        replies = await asyncio.gather(*(asked(prompt, args.answer_len) for prompt in prompts))
        for user, reply in zip(users, replies, strict=True):
            user.hears(reply, args.answer_len)
        rounds.append(measures(number + 1, replies))
    seconds = time.perf_counter() - started
    num_cached = [each["num_cached_tokens"] for each in rounds]
    known = None not in num_cached
    return {
        "seconds": seconds,
        "hit_rate": sum(num_cached) / sum(each["num_prompt_tokens"] for each in rounds) if known else None,
        "rounds": rounds,
    }


def beginning(number: int, vocab_size: int) -> list[int]:
    """Three tokens that stand for a number."""
    return [number // vocab_size**2 % vocab_size, number // vocab_size % vocab_size, number % vocab_size]


def measures(number: int, replies: Sequence[Reply]) -> dict[str, Any]:
    """One round."""
    ttft_s = [reply.ttft_s for reply in replies]
    cached = [reply.num_cached_tokens for reply in replies if reply.num_cached_tokens is not None]
    num_prompt = sum(reply.num_prompt_tokens for reply in replies)
    return {
        "round": number,
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": sum(cached) if len(cached) == len(replies) else None,
        "ttft_mean_s": fmean(ttft_s),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p90_s": float(np.percentile(ttft_s, 90)),
        "e2e_mean_s": fmean(reply.e2e_s for reply in replies),
    }


def prefix(args: argparse.Namespace) -> int:
    """Talk with the cache and without it, print both tables, write the result."""
    if args.base_url is not None:
        result, file = against_server(args)
    else:
        with model_folder(args.model) as folder:
            result, file = offline(args, folder)
    show(result)
    write_json(file, result)
    say(f"written: {file}")
    return 0


def offline(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Path]:
    """Two engines, one after the other."""
    options = engine_options(args, str(folder), load_shape(folder))
    longest = args.system_len + args.rounds * (args.message_len + args.answer_len)
    if longest > options.max_model_len:
        raise ValueError(
            f"--system-len and --rounds come to {longest} tokens, the model takes {options.max_model_len}; lower one"
        )
    result = describe("prefix", "gllm", options, folder) | talked_about(args)
    for name, caching in (("on", True), ("off", False)):
        with engine_of(options, prefix_caching=caching) as engine:
            result[name] = asyncio.run(talk_to(engine, args, options.shape.vocab_size))
        warn(f"prefix cache {name}: {result[name]['seconds']:.2f} s")
    return result, result_file(args.out, result)


def talked_about(args: argparse.Namespace) -> dict[str, Any]:
    """The workload."""
    return {
        name: getattr(args, name) for name in ("users", "rounds", "system_len", "message_len", "answer_len", "seed")
    }


@contextmanager
def engine_of(options: EngineOptions, *, prefix_caching: bool) -> Iterator[AsyncEngine]:
    """An engine that tells when each token comes."""
    from engines.gllm import runtime_config  # noqa: PLC0415 - not for --help, nor for a server

    from gllm.runtime.async_engine import AsyncEngine  # noqa: PLC0415

    config = runtime_config(options, prefix_caching=prefix_caching)
    engine = AsyncEngine(config)
    try:
        yield engine
    finally:
        engine.close()


async def talk_to(engine: AsyncEngine, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """The conversations with an engine of our own."""
    from gllm.runtime.sampling_params import SamplingParams  # noqa: PLC0415

    async def asked(prompt: list[int], num_outputs: int) -> Reply:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_outputs, detokenize=False)
        start_s, first_s, num_cached, token_ids = time.perf_counter(), 0.0, 0, []
        async for delta in engine.generate(prompt, params):
            first_s = first_s or time.perf_counter()
            num_cached = max(num_cached, delta.num_cached_tokens)
            token_ids += delta.token_ids
        return Reply(first_s - start_s, time.perf_counter() - start_s, len(prompt), num_cached, token_ids)

    async with engine.lifespan():
        await asked([1] * 8, 4)  # the first steps are slower
        return await talk(asked, args, vocab_size, cold=False)


def against_server(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """A server that runs: as it is, then with prompts that it cannot know."""
    endpoint = endpoint_of(args.base_url, args.api_key)
    name = args.model or first_model(endpoint)
    result = {**describe_run(()), "benchmark": "prefix", "backend": args.base_url, "model": name, **talked_about(args)}
    for mode, cold in (("off", True), ("on", False)):
        result[mode] = run_loop(talk_over(endpoint, name, args, cold=cold))
        warn(f"prefix cache {mode}: {result[mode]['seconds']:.2f} s")
    return result, args.out / f"{slug('prefix', 'server', name)}.json"


async def talk_over(endpoint: Endpoint, model: str, args: argparse.Namespace, *, cold: bool) -> dict[str, Any]:
    """The conversations with a server."""
    pool = Pool(endpoint, timeout_s=TIMEOUT_S)
    fixed = {"model": model, "temperature": 0, "ignore_eos": True, "stream": True}
    fixed |= {"stream_options": {"include_usage": True}}

    async def asked(prompt: list[int], num_outputs: int) -> Reply:
        answer = await pool.stream("/v1/completions", fixed | {"prompt": prompt, "max_tokens": num_outputs})
        if answer.error is not None:
            raise CommandError(f"{endpoint.url}: a request failed: {answer.error}")
        num_prompt = answer.num_prompt_tokens or len(prompt)
        return Reply(answer.ttft_s, answer.e2e_s, num_prompt, answer.num_cached_tokens, None)

    await asked([1] * 8, 4)
    done = await talk(asked, args, args.vocab_size, cold=cold)
    pool.close()
    return done


def show(result: dict[str, Any]) -> None:
    """Both tables in one."""
    say(f"{result['model']}, {where(result)}: {result['users']} users, {result['rounds']} rounds")
    header = ["cache", "round", "prompt tokens", "hit rate", "TTFT mean ms", "TTFT p90 ms", "E2E mean ms", "seconds"]
    rows = [[mode, *_cells(each), ""] for mode in ("on", "off") for each in result[mode]["rounds"]]
    for mode in ("on", "off"):
        whole_rate = _share(result[mode]["hit_rate"])
        rows.append([mode, "all", "", whole_rate, "", "", "", f"{result[mode]['seconds']:.2f}"])
    show_table(header, rows)


def _cells(each: dict[str, Any]) -> list[str]:
    cached, num_prompt = each["num_cached_tokens"], each["num_prompt_tokens"]
    times = (f"{each[name] * 1e3:.1f}" for name in ("ttft_mean_s", "ttft_p90_s", "e2e_mean_s"))
    return [str(each["round"]), f"{num_prompt:,}", _share(None if cached is None else cached / num_prompt), *times]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_engine_arguments(parser, policy="throttle")
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="a server that runs, in place of an engine of our own")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY")
    group.add_argument("--vocab-size", type=whole(2), default=10_000, metavar="N", help="a server's (default: 10,000)")
    group = parser.add_argument_group("conversations")
    for name, default, text in (
        ("users", 32, "users at once"),
        ("rounds", 6, "messages of each"),
        ("system-len", 1024, "tokens of the prompt that all share"),
        ("message-len", 64, "tokens of each message"),
        ("answer-len", 128, "tokens of each answer"),
    ):
        group.add_argument(
            f"--{name}", type=whole(1), default=default, metavar="N", help=f"{text} (default: {default:,})"
        )
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the tokens (default: 0)")
    add_out(group)
    parser.set_defaults(command=prefix)
    return run(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
