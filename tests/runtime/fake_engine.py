"""An engine that answers from a script, and helpers to ask a server in front of it."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import dataclass, field

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gllm.runtime.errors import EngineDeadError
from gllm.runtime.messages import EngineStats
from gllm.runtime.outputs import Delta, TokenLogprob
from gllm.runtime.server.app import create_app

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if mood is defined %}({{ mood }}){% endif %}{% endif %}"
)


@functools.cache
def bare_tokenizer():
    """One token a byte, and two that mark a chat's turns."""
    vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return inner


@functools.cache
def byte_tokenizer():
    """The same in transformers' clothes, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer(), chat_template=TEMPLATE)


def ids(text):
    return bare_tokenizer().encode(text).ids


@dataclass
class FakeEngine:
    """Every answer is `answer`, a token a step; answers of one request take turns."""

    answer: str = "hello"
    model_name: str = "models/fake"
    served_names: tuple[str, ...] = ("fake", "alias/fake")
    created: int = 1_700_000_000
    max_model_len: int = 200
    tokenizer: object = field(default_factory=byte_tokenizer)
    chat_template: str | None = None
    defaults: dict = field(default_factory=dict)
    failure: str | None = None

    delay_s: float = 0.0
    num_cached_tokens: int = 0
    num_a_delta: int = 1  # tokens that come together
    refuse: str | None = None  # what a request's ValueError says
    die_at: int | None = None  # the step before which the engine dies
    fail_at: int | None = None  # the step before which this answer alone fails
    end_at: int | None = None  # the step before which the deltas simply end
    hold_text: bool = False  # all text comes with the last token
    numbers: EngineStats = field(default_factory=EngineStats)

    calls: list = field(default_factory=list)  # (prompt, params, priority)
    num_running: int = 0
    num_aborted: int = 0

    async def generate(self, prompt_token_ids, params, *, priority=0):
        self.calls.append((prompt_token_ids, params, priority))
        if self.refuse is not None:
            raise ValueError(self.refuse)
        self.num_running += 1
        complete = False
        try:
            async for delta in self._steps(prompt_token_ids, params):
                yield delta
            complete = True
        finally:
            self.num_running -= 1
            self.num_aborted += not complete

    async def _steps(self, prompt, params):
        tokens = ids(self.answer)
        for start in range(0, min(len(tokens), params.max_tokens), self.num_a_delta):
            await asyncio.sleep(self.delay_s)
            self._go_wrong(start)
            if start == self.end_at:
                return
            for index in range(params.n):
                yield self._delta(prompt, params, tokens, start, index)
                if start == self.fail_at:
                    yield Delta(index=index, finish_reason="error")

    def _go_wrong(self, step):
        if step == self.die_at:
            self.failure = "worker 1 was killed"
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def _delta(self, prompt, params, tokens, start, index):
        end = min(start + self.num_a_delta, len(tokens), params.max_tokens)
        last = end in (len(tokens), params.max_tokens)
        given = tokens[: end if last else 0] if self.hold_text else tokens[start:end]
        delta = Delta(index=index, token_ids=tokens[start:end], text=bare_tokenizer().decode(given))
        if last:
            delta.finish_reason = "stop" if end == len(tokens) else "length"
        if start == 0:
            delta.num_cached_tokens = self.num_cached_tokens + index  # what an earlier answer left is found as well
            if index == 0 and params.prompt_logprobs is not None:
                delta.prompt_logprobs = [None, *(ranked(each, params.prompt_logprobs) for each in prompt[1:])]
        if params.logprobs is not None:
            delta.logprobs = [ranked(each, params.logprobs) for each in tokens[start:end]]
        return delta

    def stats(self):
        return self.numbers


def ranked(token, num):
    """The token ranks second; the likeliest has the id above it, the third the id below."""
    near = [TokenLogprob(token + 1, -0.5, 1), TokenLogprob(token, -1.5, 2), TokenLogprob(token - 1, -float("inf"), 3)]
    return [near[1], *near[:num]]


def ask(engine, path, body=None, *, headers=None, app=None, content=None):
    """One request to a server that lives for it alone: GET without a body, else POST."""

    async def go():
        transport = httpx.ASGITransport(app or create_app(engine), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            method = "GET" if body is None and content is None else "POST"
            response = await client.request(method, path, json=body, content=content, headers=headers)
            assert engine is None or engine.num_running == 0, "work goes on after its answer"
            return response

    return asyncio.run(go())


def complete(engine, **body):
    return ask(engine, "/v1/completions", {"prompt": "hi"} | body)


def chat(engine, **body):
    return ask(engine, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | body)


def events(response):
    """A stream's events; the closing mark as the text it is."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    lines = response.text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def error_of(response, status):
    """The one shape that all errors have."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "\n" not in error["message"]
    return error
