"""`evaluate`: score the default model's held-out cases through an OpenAI endpoint. No torch here.

Every case is a chat with one right answer (`gllm.runtime.default_model.tasks`), asked at temperature 0 and compared
character by character.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx

from gllm.console.parser import FAILED
from gllm.console.progress import show_progress
from gllm.console.terminal import say, say_json, say_table, warn
from gllm.runtime.default_model.tasks import SCORED, held_out_cases
from gllm.runtime.serve import running

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from gllm.runtime.default_model.tasks import Case

    StartServer = Callable[[argparse.Namespace], AbstractContextManager[str]]

MAX_TOKENS = 256
"""More than any answer has."""
TIMEOUT_S = 600.0
NUM_SHOWN = 5
"""Wrong answers that the result quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said to one case: a text, or why there is none."""

    case: Case
    text: str | None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is the one right answer."""
        return self.text == self.case.answer


def evaluate_command(args: argparse.Namespace, start_server: StartServer = running) -> int:
    """Score, print, and return 0 if the share of right answers reaches the threshold.

    Args:
        args: The command line, see `gllm.runtime.cli`. Of a server that runs, --model is the name it knows a model by.
        start_server: Starts a server as the command line asks and gives its base URL; used without --base-url.
    """
    if args.base_url is not None:
        result = _evaluated(args, args.base_url, args.model_named)
    else:
        with start_server(args) as base_url:
            result = _evaluated(args, base_url, None)
    passed = bool(result["accuracy"] >= args.threshold)
    if args.json:
        say_json({**result, "threshold": args.threshold, "passed": passed})
    else:
        _print(result)
    if not passed:
        warn(f"{result['accuracy']:.1%} of the answers are right, less than --threshold {args.threshold:.1%}")
    return 0 if passed else FAILED


def evaluate(
    base_url: str,
    model: str | None = None,
    *,
    num_cases: int = 200,
    seed: int = 0,
    concurrency: int = 32,
    answered: list[Answer] | None = None,
) -> dict[str, Any]:
    """Ask a server the held-out cases of a seed, so many at once; the accuracy in all and for each task.

    Args:
        base_url: With or without /v1 at its end.
        model: As the server knows it; None: the first that it names.
        num_cases: The tasks take turns.
        seed: Which cases.
        concurrency: Cases that wait for their answer at once.
        answered: Answers are added to it as they come.

    Raises:
        ValueError: there is no such server, or it names no model.
    """
    root = base_url.rstrip("/").removesuffix("/v1")
    answers = [] if answered is None else answered
    try:
        name = asyncio.run(_ask_all(root, model, held_out_cases(num_cases, seed), concurrency, answers))
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ValueError(
            f"{base_url}: no server answers there ({error}); start one with python -m gllm.runtime serve"
        ) from None
    return {"model": name, "seed": seed, **summarize(answers)}


def summarize(answers: list[Answer]) -> dict[str, Any]:
    """Counts in all and for each task; a hash of all texts, whatever order they came in; the first wrong ones."""
    right = Counter(answer.case.task for answer in answers if answer.is_right)
    total = Counter(answer.case.task for answer in answers)
    texts = sorted(json.dumps([answer.case.messages, answer.text]) for answer in answers)
    wrong = [answer for answer in answers if not answer.is_right]
    return {
        **_score(right.total(), total.total()),
        "num_errors": sum(answer.text is None for answer in answers),
        "tasks": {task: _score(right[task], total[task]) for task in SCORED if total[task]},
        "answers_sha256": sha256("\n".join(texts).encode()).hexdigest(),
        "wrong": [
            {
                "question": answer.case.messages[-1]["content"],
                "expected": answer.case.answer,
                "answer": answer.text,
                "error": answer.error,
            }
            for answer in wrong[:NUM_SHOWN]
        ],
    }


def _score(num_right: int, num_cases: int) -> dict[str, Any]:
    return {"num_cases": num_cases, "num_right": num_right, "accuracy": num_right / num_cases}


def _evaluated(args: argparse.Namespace, base_url: str, model: str | None) -> dict[str, Any]:
    answers: list[Answer] = []
    options: dict[str, Any] = {"num_cases": args.num_cases, "seed": args.case_seed, "concurrency": args.concurrency}
    if args.quiet:
        return evaluate(base_url, model, **options)
    with show_progress(args.num_cases, lambda: len(answers), what="cases"):
        return evaluate(base_url, model, **options, answered=answers)


async def _ask_all(root: str, model: str | None, cases: list[Case], concurrency: int, answers: list[Answer]) -> str:
    """Ask every case, add the answers in the order they come, return the model's name."""
    limits = httpx.Limits(max_connections=concurrency)
    timeout = httpx.Timeout(TIMEOUT_S, pool=None)  # waiting for one's turn is no failure
    async with httpx.AsyncClient(base_url=root, limits=limits, timeout=timeout, trust_env=False) as client:
        name = await _first_model(client) if model is None else model

        async def ask(case: Case) -> None:
            answers.append(await _ask(client, name, case))

        await asyncio.gather(*map(ask, cases))
    return name


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        raise ValueError(
            f"{client.base_url}/v1/models: names no model (status {response.status_code}); say which with --model"
        ) from None


async def _ask(client: httpx.AsyncClient, model: str, case: Case) -> Answer:
    body = {"model": model, "messages": case.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    try:
        response = await client.post("/v1/chat/completions", json=body)
    except (httpx.ConnectError, httpx.UnsupportedProtocol):
        raise
    except httpx.HTTPError as error:
        return Answer(case=case, text=None, error=f"{type(error).__name__} {error}".strip())
    if response.status_code != httpx.codes.OK:
        return Answer(case=case, text=None, error=f"{response.status_code}: {response.text[:200]}")
    return _read(case, response)


def _read(case: Case, response: httpx.Response) -> Answer:
    try:
        return Answer(case=case, text=str(response.json()["choices"][0]["message"]["content"]))
    except (ValueError, LookupError, TypeError):
        return Answer(case=case, text=None, error=f"not a chat completion: {response.text[:200]}")


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table  # noqa: PLC0415 - the command line starts without it

    table = Table("task", "cases", "right", "accuracy", title=result["model"])
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in (*result["tasks"].items(), ("all", result)):
        table.add_row(name, f"{score['num_cases']:,}", f"{score['num_right']:,}", f"{score['accuracy']:.1%}")
    say_table(table)
    for wrong in result["wrong"]:
        got = wrong["error"] if wrong["answer"] is None else repr(wrong["answer"])
        say(f"{wrong['question']!r}: {wrong['expected']!r} is right, the answer was {got}")
