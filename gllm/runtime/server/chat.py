"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from gllm.runtime.server.generation import Job, generate, new_id, now_s
from gllm.runtime.server.protocol import ChatBody  # noqa: TC001 - FastAPI reads the annotation
from gllm.runtime.server.reply import reply
from gllm.runtime.server.sampling import num_tokens_for, sampling_params
from gllm.runtime.server.service import service_of
from gllm.runtime.server.tokens import chat_logprobs, decoder, encode_chat, prompt_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gllm.runtime.outputs import Logprobs
    from gllm.runtime.server.engine import ServedEngine
    from gllm.runtime.server.generation import Answer, Gathered, Piece

router = APIRouter()


@router.post("/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Say what comes next in a conversation."""
    start_s, service = time.monotonic(), service_of(request)
    name = service.check_model(body.model)
    service.check_alive()
    jobs = [await _job(service.engine, body)]
    pieces = generate(service, jobs, priority=body.priority or 0, start_s=start_s)
    return await reply(request, body, Chat(service.engine, body, jobs, name), pieces)


async def _job(engine: ServedEngine, body: ChatBody) -> Job:
    prompt = await encode_chat(engine, body)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    params = sampling_params(
        engine,
        body,
        max_tokens=num_tokens_for(engine, len(prompt), wanted),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Job(prompt, params)


@dataclass(slots=True)
class Chat:
    """One answer to `POST /v1/chat/completions`, in OpenAI's form."""

    engine: ServedEngine
    body: ChatBody
    jobs: list[Job]
    model: str
    _id: str = field(default_factory=lambda: new_id("chatcmpl"))
    _created: int = field(default_factory=now_s)
    _begun: set[int] = field(default_factory=set)  # answers whose first chunk is out

    def head(self) -> dict[str, Any]:
        """What every chunk carries."""
        return {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self.model}

    def whole(self, gathered: Gathered) -> dict[str, Any]:
        """All choices."""
        choices = [self._message(index, answer) for index, answer in enumerate(gathered.answers[0])]
        answer = self.head() | {"object": "chat.completion", "choices": choices}
        if self.body.prompt_logprobs is not None:
            entries = gathered.prompt_logprobs.get(0, [])
            answer["prompt_logprobs"] = prompt_logprobs(decoder(self.engine.tokenizer), entries)
        return answer

    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The role before an answer's first text, then its text; what brings neither text nor an end is not sent."""
        delta = piece.delta
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(delta.index, {"role": "assistant", "content": ""})
        logprobs = self._logprobs(delta.logprobs)
        if delta.text or logprobs or delta.finish_reason:
            said = {"content": delta.text} if delta.text or logprobs else {}
            end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            yield self._chunk(delta.index, said, logprobs) | end

    def _message(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.logprobs) if self.body.logprobs else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }

    def _chunk(self, index: int, said: dict[str, str], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: list[Logprobs] | None) -> dict[str, Any] | None:
        if not self.body.logprobs or not entries:
            return None
        return chat_logprobs(decoder(self.engine.tokenizer), entries)
