"""Generating for one HTTP request: several prompts, several answers to each, one stream of deltas."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.runtime.errors import EngineDeadError
from gllm.runtime.server.errors import ApiError, bad_request
from gllm.runtime.server.metrics import Stopwatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from gllm.runtime.outputs import Delta, FinishReason, Logprobs
    from gllm.runtime.sampling_params import SamplingParams
    from gllm.runtime.server.engine import ServedEngine
    from gllm.runtime.server.service import Service


class Job(NamedTuple):
    """One prompt and what to do with it."""

    prompt_token_ids: list[int]
    params: SamplingParams


class Piece(NamedTuple):
    """A delta and the job it belongs to. `delta.index` counts the job's own answers."""

    job: int
    delta: Delta


def new_id(prefix: str) -> str:
    """A name for one answer that no other has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now_s() -> int:
    """Seconds since 1970."""
    return int(time.time())


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request. A prompt counts once however many answers it gets."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    num_cached_by_job: dict[int, int] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Count a delta; what is cached of a prompt is what its first answer found."""
        job, delta = piece
        self.num_output_tokens += len(delta.token_ids)
        if delta.index == 0:
            self.num_cached_by_job[job] = max(delta.num_cached_tokens, self.num_cached_by_job.get(job, 0))

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.num_cached_by_job.values())},
        }


@dataclass(slots=True)
class Answer:
    """One answer, gathered whole."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        """What came next."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if delta.stop_reason is None else delta.stop_reason


@dataclass(slots=True)
class Gathered:
    """All answers to all prompts of one HTTP request."""

    answers: list[list[Answer]]  # by job, then by index
    usage: Usage
    prompt_logprobs: dict[int, list[Logprobs | None]] = field(default_factory=dict)  # by job


async def gather(pieces: AsyncIterator[Piece], jobs: Sequence[Job], usage: Usage) -> Gathered:
    """Read everything."""
    whole = Gathered([[Answer() for _ in range(job.params.n)] for job in jobs], usage)
    async for piece in pieces:
        job, delta = piece
        usage.add(piece)
        whole.answers[job][delta.index].add(delta)
        if delta.prompt_logprobs is not None:
            whole.prompt_logprobs[job] = delta.prompt_logprobs
    return whole


async def generate(
    service: Service, jobs: Sequence[Job], *, priority: int, start_s: float
) -> AsyncGenerator[Piece, None]:
    """Everything that the engine adds to the jobs' answers, measured. Closing it aborts them all.

    Args:
        service: the engine, and where the measures go.
        jobs: what to generate.
        priority: lower goes first, if the engine's queue is ordered so.
        start_s: when the request arrived, by the monotonic clock.

    Raises:
        ApiError: 400 where the engine refuses a job; 500 where an answer ends in an error.
        EngineDeadError: The engine died.
    """
    watch = Stopwatch(service.metrics, start_s)
    unfinished = sum(job.params.n for job in jobs)
    async with aclosing(_merge(service.engine, jobs, priority)) as pieces:
        async for piece in pieces:
            watch.saw(piece.job, piece.delta, len(jobs[piece.job].prompt_token_ids))
            if piece.delta.finish_reason == "error":
                raise ApiError(500, "the engine failed while it generated this answer")
            unfinished -= piece.delta.finish_reason is not None
            yield piece
    if unfinished:
        raise EngineDeadError(service.engine.failure or "it ended an answer without a reason")


async def _merge(engine: ServedEngine, jobs: Sequence[Job], priority: int) -> AsyncGenerator[Piece, None]:
    """All jobs' deltas as they come. A single job needs no task of its own."""
    if len(jobs) == 1:
        async with aclosing(_deltas(engine, jobs[0], priority)) as deltas:
            async for delta in deltas:
                yield Piece(0, delta)
        return
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(jobs))
    tasks = [asyncio.create_task(_pump(engine, job, jobs[job], priority, arrived)) for job in range(len(jobs))]
    try:
        for _ in jobs:
            while (piece := await arrived.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    engine: ServedEngine, number: int, job: Job, priority: int, arrived: asyncio.Queue[Piece | Exception | None]
) -> None:
    """Bring one job's deltas to the queue, then None or what went wrong."""
    try:
        async with aclosing(_deltas(engine, job, priority)) as deltas:
            async for delta in deltas:
                await arrived.put(Piece(number, delta))
    except Exception as error:  # noqa: BLE001 - whoever reads the queue raises it
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _deltas(engine: ServedEngine, job: Job, priority: int) -> AsyncGenerator[Delta, None]:
    """One job's deltas. A ValueError instead of the first is the client's mistake, a later one is ours."""
    try:
        stream = engine.generate(job.prompt_token_ids, job.params, priority=priority)
    except ValueError as error:
        raise bad_request(str(error)) from error
    try:
        try:
            first = await anext(stream)
        except ValueError as error:
            raise bad_request(str(error)) from error
        except StopAsyncIteration:
            return
        yield first
        async for delta in stream:
            yield delta
    finally:
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()
