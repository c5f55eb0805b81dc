"""From an engine's tokens to a client's answers: detokenising, stop strings, `n` answers of one request."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gllm.runtime.detokenizer import Detokenizer
from gllm.runtime.messages import EngineStats, NewRequest, Progress, Refused
from gllm.runtime.outputs import Delta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gllm.runtime.client import EngineClient
    from gllm.runtime.errors import EngineDeadError
    from gllm.runtime.messages import Notice, TokenDelta
    from gllm.runtime.sampling_params import SamplingParams

    Sink = Callable[[Delta | Exception], None]
    """Gets every delta of a request, or the error that ended it."""


class Answer:
    """One of a request's answers, as it grows."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Any) -> None:  # noqa: ANN401 - transformers' own
        self._index = index
        self._keeps_stop = params.include_stop_str_in_output
        self._text = None if tokenizer is None else Detokenizer(tokenizer, params)
        self.is_over = False

    def push(self, news: TokenDelta) -> Delta:
        """What the engine's news add; a stop string found here ends the answer, whatever the engine does."""
        delta = Delta(
            self._index,
            news.token_ids,
            "",
            news.logprobs,
            news.finish_reason,
            news.stop_token_id,
            news.num_cached_tokens,
            news.prompt_logprobs,
        )
        self.is_over = news.finish_reason is not None
        if self._text is not None:
            self._detokenize(delta, self._text)
        return delta

    def _detokenize(self, delta: Delta, text: Detokenizer) -> None:
        ends_with_stop_token = delta.finish_reason == "stop" and not self._keeps_stop
        shown = delta.token_ids[:-1] if ends_with_stop_token else delta.token_ids
        delta.text, stop = text.push(shown)
        if stop is None and self.is_over:
            delta.text += text.finish()
        if text.stop is not None:  # perhaps only now that no token follows
            delta.finish_reason, delta.stop_reason = "stop", text.stop
            self.is_over = True


@dataclass(slots=True)
class _Stream:
    answer: Answer
    sink: Sink


class Generations:
    """Requests on their way through an engine.

    Not thread-safe: whoever receives the engine's notices passes them to `deliver` where requests are submitted too.
    """

    def __init__(self, client: EngineClient, tokenizer: Any) -> None:  # noqa: ANN401 - transformers' own
        self._client, self._tokenizer = client, tokenizer
        self._streams: dict[int, _Stream] = {}
        self._keys = itertools.count()
        self.stats = EngineStats()

    def prepare(
        self, prompt_token_ids: list[int], params: SamplingParams, sink: Sink, *, priority: int = 0
    ) -> list[NewRequest]:
        """Open a stream for each of `params.n` answers; the requests are still to be submitted.

        Raises:
            ValueError: The engine can never serve this.
        """
        longest = self._client.ready.max_model_len
        if not prompt_token_ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        if len(prompt_token_ids) >= longest:
            raise ValueError(
                f"the prompt has {len(prompt_token_ids)} tokens; prompt and answer together may have {longest}"
            )
        vocab_size = self._client.model.shape.vocab_size
        params.check_vocab(vocab_size)
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
            raise ValueError(f"the prompt has token ids outside the model's vocabulary, 0 to {vocab_size - 1}")
        now = time.monotonic_ns()
        requests = []
        for index in range(params.n):
            key = next(self._keys)
            self._streams[key] = _Stream(Answer(index, params, self._tokenizer), sink)
            requests.append(NewRequest(key, prompt_token_ids, params, params.seed_of(index), now, priority))
        return requests

    def submit(self, requests: list[NewRequest]) -> None:
        """Send prepared requests; one turn of the engine sees them all."""
        self._client.submit(requests)

    def abort(self, requests: Sequence[NewRequest]) -> None:
        """Forget what is left of these."""
        keys = [request.key for request in requests if self._streams.pop(request.key, None) is not None]
        if keys and self._client.failure is None:
            self._client.abort(keys)

    def deliver(self, notice: Notice) -> None:
        """Pass news on to whom they concern."""
        if isinstance(notice, Progress):
            self.stats = notice.stats
            for news in notice.deltas:
                self._push(news)
        elif isinstance(notice, Refused):
            stream = self._streams.pop(notice.key, None)
            if stream is not None:
                stream.sink(ValueError(notice.reason))

    def fail(self, error: EngineDeadError) -> None:
        """End every request with an error."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.sink(error)

    def _push(self, news: TokenDelta) -> None:
        stream = self._streams.get(news.key)
        if stream is None:  # aborted, or ended by a stop string
            return
        try:
            delta = stream.answer.push(news)
        except Exception as error:  # noqa: BLE001 - a tokenizer's own: this request fails, the others go on
            del self._streams[news.key]
            self._client.abort([news.key])
            stream.sink(error)
            return
        if stream.answer.is_over:
            del self._streams[news.key]
            if news.finish_reason is None:
                self._client.abort([news.key])
        stream.sink(delta)
