"""`POST /v1/completions`."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from gllm.runtime.server.generation import Job, Piece, generate, new_id, now_s
from gllm.runtime.server.protocol import CompletionBody  # noqa: TC001 - FastAPI reads the annotation
from gllm.runtime.server.reply import reply
from gllm.runtime.server.sampling import num_tokens_for, sampling_params
from gllm.runtime.server.service import service_of
from gllm.runtime.server.tokens import completion_logprobs, decoder, encode, prompt_logprobs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from gllm.runtime.outputs import Delta, Logprobs
    from gllm.runtime.server.engine import ServedEngine
    from gllm.runtime.server.generation import Answer, Gathered

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/completions", response_model=None)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue each prompt."""
    start_s, service = time.monotonic(), service_of(request)
    name = service.check_model(body.model)
    service.check_alive()
    jobs = [await _job(service.engine, body, prompt) for prompt in body.prompt]
    pieces = generate(service, jobs, priority=body.priority or 0, start_s=start_s)
    if body.max_tokens == 0:
        pieces = _without_output(pieces)
    return await reply(request, body, Completions(service.engine, body, jobs, name), pieces)


async def _job(engine: ServedEngine, body: CompletionBody, prompt: str | list[int]) -> Job:
    if isinstance(prompt, str):
        prompt = await encode(engine, prompt, add_special_tokens=body.add_special_tokens is not False)
    wanted = 1 if body.max_tokens == 0 else body.max_tokens  # an echo alone still takes a step
    decided = {
        "max_tokens": num_tokens_for(engine, len(prompt), wanted, DEFAULT_MAX_TOKENS),
        "logprobs": body.logprobs,
    }
    if body.echo and body.prompt_logprobs is None:
        decided["prompt_logprobs"] = body.logprobs
    return Job(prompt, sampling_params(engine, body, **decided))


async def _without_output(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """The same, as if no token had been generated."""
    async with aclosing(pieces):
        async for job, delta in pieces:
            reason = delta.finish_reason and "length"
            bare = replace(delta, token_ids=[], text="", logprobs=None, finish_reason=reason, stop_reason=None)
            yield Piece(job, bare)


@dataclass(slots=True)
class Completions:
    """One answer to `POST /v1/completions`, in OpenAI's form."""

    engine: ServedEngine
    body: CompletionBody
    jobs: list[Job]
    model: str
    _id: str = field(default_factory=lambda: new_id("cmpl"))
    _created: int = field(default_factory=now_s)
    _offsets: dict[int, int] = field(default_factory=dict)  # by choice: characters streamed so far

    def head(self) -> dict[str, Any]:
        """What the answer and every chunk of it carry."""
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self.model}

    def whole(self, gathered: Gathered) -> dict[str, Any]:
        """All choices."""
        choices = [
            self._whole_choice(job, index, answer, gathered.prompt_logprobs.get(job))
            for job, answers in enumerate(gathered.answers)
            for index, answer in enumerate(answers)
        ]
        return self.head() | {"choices": choices}

    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The text that a delta brings; the prompt, if it is echoed, goes before the first of it."""
        job, delta = piece
        choice = job * self.body.num_answers + delta.index
        opening = self.body.echo and choice not in self._offsets
        text, token_ids, offset = delta.text, delta.token_ids, self._offsets.get(choice, 0)
        entries: list[Logprobs | None] = list(delta.logprobs or ())
        if opening:
            text, token_ids, entries = self._echo(job, text, token_ids, entries, delta.prompt_logprobs)
        if text or delta.finish_reason is not None or (token_ids and self.body.logprobs is not None):
            logprobs = self._logprobs(token_ids, entries, offset)
            self._offsets[choice] = _end_of(logprobs, offset)
            yield _choice(choice, text, logprobs, delta)

    def _whole_choice(
        self, job: int, index: int, answer: Answer, of_prompt: list[Logprobs | None] | None
    ) -> dict[str, Any]:
        text, token_ids = answer.text, answer.token_ids
        entries: list[Logprobs | None] = list(answer.logprobs)
        if self.body.echo:
            text, token_ids, entries = self._echo(job, text, token_ids, entries, of_prompt)
        number = job * self.body.num_answers + index
        choice = _choice(number, text, self._logprobs(token_ids, entries, 0), answer)
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(decoder(self.engine.tokenizer), of_prompt or [])
        return choice

    def _echo(
        self,
        job: int,
        text: str,
        token_ids: list[int],
        entries: list[Logprobs | None],
        of_prompt: list[Logprobs | None] | None,
    ) -> tuple[str, list[int], list[Logprobs | None]]:
        """An answer with its prompt before it."""
        prompt_ids = self.jobs[job].prompt_token_ids
        nothing: list[Logprobs | None] = [None] * len(prompt_ids)
        return self._prompt_text(job) + text, prompt_ids + token_ids, (of_prompt or nothing) + entries

    def _logprobs(self, token_ids: list[int], entries: list[Logprobs | None], offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(decoder(self.engine.tokenizer), token_ids, entries, offset=offset)

    def _prompt_text(self, job: int) -> str:
        prompt, tokenizer = self.body.prompt[job], self.engine.tokenizer
        if isinstance(prompt, str):
            return prompt
        return tokenizer.decode(prompt) if tokenizer is not None else ""


def _end_of(logprobs: dict[str, Any] | None, offset: int) -> int:
    """Where the next token's text begins."""
    return offset if logprobs is None else offset + sum(map(len, logprobs["tokens"]))


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, end: Answer | Delta) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": end.finish_reason,
        "stop_reason": end.stop_reason,
    }
