"""The offline API: `LLM(path).generate(prompts, params)`, with the names that vLLM's users know."""

from __future__ import annotations

import atexit
import operator
import reprlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gllm.console.progress import show_progress
from gllm.parallel import Parallel
from gllm.runtime.client import EngineClient
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.default_model import PATH
from gllm.runtime.generation import Generations
from gllm.runtime.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.tokenizer import load_tokenizer, sampling_defaults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from gllm.runtime.messages import EngineStats, NewRequest
    from gllm.runtime.outputs import Logprobs

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

Message = Mapping[str, str]
"""`{"role": ..., "content": ...}`."""

_PATIENCE_S = 1.0


@dataclass(slots=True)
class _Pending:
    """A request on its way."""

    prompt: str | None
    token_ids: list[int]
    answers: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    num_left: int = 0
    logprobs: list[list[Logprobs]] = field(default_factory=list)
    error: Exception | None = None

    def take(self, delta: Delta | Exception) -> None:
        if self.error is not None:  # the other answers of a request that failed
            return
        if isinstance(delta, Exception):
            self.error, self.num_left = delta, 0
            return
        answer = self.answers[delta.index]
        answer.token_ids += delta.token_ids
        answer.text += delta.text
        self.logprobs[delta.index] += delta.logprobs or ()
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
            self.num_left -= 1


class LLM:
    """A model, ready to answer lists of prompts.

    Args:
        model: a folder with config.json, safetensors and a tokenizer; None: the small model that comes with gLLM;
            or a whole configuration, and then nothing else.
        pp: pipeline stages.
        tp: slices of each stage's layers.
        ep: groups of a stage's ranks that share its experts.
        pp_layers: layers of each stage; None: balanced.
        options: fields of `RuntimeConfig`.

    Raises:
        ValueError: An option or the model does not fit; one line says what to change.
    """

    def __init__(
        self,
        model: str | RuntimeConfig | None = None,
        *,
        pp: int = 1,
        tp: int = 1,
        ep: int = 1,
        pp_layers: tuple[int, ...] | None = None,
        **options: Any,  # noqa: ANN401 - RuntimeConfig's own
    ) -> None:
        if isinstance(model, RuntimeConfig):
            self.config = model
        else:
            parallel = Parallel(pp=pp, tp=tp, ep=ep, pp_layers=pp_layers)
            folder = str(Path(model or PATH).expanduser())
            self.config = _typed(RuntimeConfig(model=folder, parallel=parallel, **_known(options)))
        self._client = EngineClient(self.config)
        atexit.register(self.close)
        try:
            self.tokenizer: Any = load_tokenizer(self.config)
            self._client.wait_until_ready()
        except BaseException:
            self.close()
            raise
        self._generations = Generations(self._client, self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts; the results are in their order.

        Args:
            prompts: one or several.
            sampling_params: for all of them, or one for each; None: the model's own.
            use_tqdm: show progress on standard error.

        Raises:
            ValueError: A prompt can never be served; nothing was generated.
            EngineDeadError: The engine died.
        """
        listed = _listed(prompts)
        params = self._params(sampling_params, len(listed))
        pending, requests = self._prepare(listed, params)
        self._generate(pending, requests, show=use_tqdm)
        together = enumerate(zip(pending, params, strict=True))
        return [self._output(str(number), entry, wanted) for number, (entry, wanted) in together]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,  # noqa: ANN401 - the template's own
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template."""
        self.check_chat()
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self._chat_text(conversation, template_options) for conversation in conversations]  # type: ignore[arg-type]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer one prompt piece by piece; closing the iterator aborts what is left."""
        params = params or self.default_sampling_params()
        news: deque[Delta | Exception] = deque()
        requests = self._generations.prepare(self._tokens(prompt)[1], params, news.append)
        left = params.n
        try:
            self._generations.submit(requests)
            while left:
                self._listen()
                while news:
                    delta = news.popleft()
                    if isinstance(delta, Exception):
                        raise delta
                    left -= delta.finish_reason is not None
                    yield delta
        finally:
            self._generations.abort(requests)

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer one conversation piece by piece."""
        self.check_chat()
        return self.stream(self.tokenizer.encode(self._chat_text(messages, {}), add_special_tokens=False), params)

    def check_chat(self) -> None:
        """Raise `ValueError` unless the model has a chat template."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(f"{self.config.model} has no chat template; use generate")

    def _chat_text(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )
        return text

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for."""
        return SamplingParams(**sampling_defaults(self.config.model))

    def stats(self) -> EngineStats:
        """The engine's numbers as of its last news."""
        return self._generations.stats

    def close(self) -> None:
        """End the engine; also done when Python ends."""
        atexit.unregister(self.close)
        self._client.close()

    def _prepare(self, prompts: list[Prompt], params: list[SamplingParams]) -> tuple[list[_Pending], list[NewRequest]]:
        """Open a stream for each answer; none if one of the prompts can never be served."""
        pending: list[_Pending] = []
        requests: list[NewRequest] = []
        try:
            for prompt, wanted in zip(prompts, params, strict=True):
                text, token_ids = self._tokens(prompt)
                entry = _pending(text, token_ids, wanted.n)
                pending.append(entry)
                requests += self._generations.prepare(token_ids, wanted, entry.take)
        except BaseException:
            self._generations.abort(requests)
            raise
        return pending, requests

    def _generate(self, pending: list[_Pending], requests: list[NewRequest], *, show: bool) -> None:
        def count() -> int:
            return sum(entry.num_left <= 0 for entry in pending)

        watching = show_progress(len(pending), count, doing="generating") if show else nullcontext()
        try:
            with watching:
                self._generations.submit(requests)
                num_done = 0  # from the first on, so that each is looked at once
                while num_done < len(pending):
                    self._listen()
                    while num_done < len(pending) and pending[num_done].num_left <= 0:
                        num_done += 1
        finally:
            self._generations.abort(requests)
        error = next((entry.error for entry in pending if entry.error is not None), None)
        if error is not None:
            raise error

    def _listen(self) -> None:
        notice = self._client.receive(_PATIENCE_S)
        if notice is not None:
            self._generations.deliver(notice)

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if isinstance(params, Mapping) or not all(isinstance(each, SamplingParams) for each in params):
            raise ValueError(f"sampling_params is {params!r}; give SamplingParams, or a list of them")
        if len(params) != count:
            raise ValueError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each")
        return list(params)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if not isinstance(prompt, str):
            return None, _token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError(f"{self.config.model} has no tokenizer; give prompts as token ids")
        return prompt, self.tokenizer.encode(prompt)

    def _output(self, name: str, entry: _Pending, params: SamplingParams) -> RequestOutput:
        for answer, logprobs in zip(entry.answers, entry.logprobs, strict=True):
            if params.logprobs is not None:
                answer.logprobs = [self._named(place) for place in logprobs]
                answer.cumulative_logprob = sum(place[0].logprob for place in logprobs)
        places = entry.prompt_logprobs
        return RequestOutput(
            request_id=name,
            prompt=entry.prompt,
            prompt_token_ids=entry.token_ids,
            prompt_logprobs=None
            if places is None
            else [None if place is None else self._named(place) for place in places],
            outputs=entry.answers,
            finished=True,
            num_cached_tokens=entry.num_cached_tokens,
        )

    def _named(self, place: Logprobs) -> dict[int, Logprob]:
        decode = (lambda _: "") if self.tokenizer is None else (lambda token_id: self.tokenizer.decode([token_id]))
        return {entry.token_id: Logprob(entry.logprob, entry.rank, decode(entry.token_id)) for entry in place}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in RuntimeConfig.__dataclass_fields__ if name not in ("model", "parallel")]
    for name in options:
        if name not in known:
            raise ValueError(f"LLM: unknown option {name!r}; known: pp, tp, ep, pp_layers, {', '.join(known)}")
    return options


def _typed(config: RuntimeConfig) -> RuntimeConfig:
    """The configuration, if its values have the types that every process will read them with."""
    try:
        return msgspec.convert(config.to_json(), RuntimeConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"LLM: {error}") from None


def _token_ids(prompt: object) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise ValueError(f"a prompt is {reprlib.repr(prompt)}; give a text or a list of token ids") from None


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _pending(prompt: str | None, token_ids: list[int], num_answers: int) -> _Pending:
    answers = [CompletionOutput(index, "", [], None, None, None) for index in range(num_answers)]
    return _Pending(prompt, token_ids, answers, num_left=num_answers, logprobs=[[] for _ in answers])
