"""Text from tokens as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.runtime.sampling_params import SamplingParams


class Detokenizer:
    """The text of one answer; together its pieces are what the tokenizer makes of all the tokens at once.

    A token that ends the answer, such as EOS, is not to be pushed if its text is not wanted. As in vLLM, a stop
    string counts from the first token after `min_tokens`, where it ends; of several, the one that ends first.
    One limit: SentencePiece's byte tokens that form no character can change text that is out already; it is not
    taken back.

    Args:
        tokenizer: a fast tokenizer of transformers, or one of the tokenizers library.
        params: the request's; stop, include_stop_str_in_output, min_tokens, skip_special_tokens, detokenize count.

    Raises:
        ValueError: the tokenizer is a slow one.
    """

    __slots__ = ("_held", "_includes_stop", "_is_off", "_min_tokens", "_pieces", "_stops", "num_tokens", "stop")

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:  # noqa: ANN401 - transformers' or tokenizers'
        self.num_tokens = 0  # taken in; those after a stop string are not
        self.stop: str | None = None  # the stop string that was found
        self._stops = params.stop_strings
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._is_off = not params.detokenize
        self._held = ""  # the end of the text, which may begin a stop string
        self._pieces = _Pieces(_backend(tokenizer), skip_special_tokens=params.skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string if it has been found; then the answer ends there."""
        if self._is_off:
            self.num_tokens += len(token_ids)
            return "", None
        text = ""
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            piece = self._pieces.push(token_id)
            if piece:
                text += self._release(piece)
        return text, self.stop

    def finish(self) -> str:
        """The rest of the text, when no token will follow; it may be that a stop string is only seen now."""
        if self._is_off or self.stop is not None:
            return ""
        text = self._release(self._pieces.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, piece: str) -> str:
        """Append `piece` to what is held back; give out what no stop string can claim."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = _first_stop(text, len(self._held), self._stops) if self.num_tokens > self._min_tokens else None
        if found is None:
            num_certain = len(text) - _num_open(text, self._stops)
            self._held = text[num_certain:]
            return text[:num_certain]
        self._held = ""
        start, end = found
        self.stop = text[start:end]
        return text[: end if self._includes_stop else start]


class _Pieces:
    """Incremental decoding: the pieces and the rest join into the decoding of the whole."""

    __slots__ = ("_context", "_pending", "_skipped", "_skips", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._skipped = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._context: list[int] = []  # tokens of the last piece: what is decoded may depend on them
        self._pending: list[int] = []  # tokens whose text is not out

    def push(self, token_id: int) -> str:
        """The text that this token completes, often none."""
        if token_id in self._skipped:  # the stream would keep it, and go through a run of them again and again
            return ""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - the library raises nothing finer: the text that is out has changed
            return self._restart()
        if not piece:
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """The text of tokens that were waiting for the rest of a character."""
        if not self._pending:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        return text[len(before) :] if text.startswith(before) else self._decode(self._pending)

    def _restart(self) -> str:
        """Give out what is pending as it stands, and go on from there."""
        piece = self.finish()
        self._context, self._pending = self._pending, []
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skips)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips)


def _first_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[int, int] | None:
    """Where the stop string that ends first stands, of those that end after `num_old` characters."""
    starts = ((text.find(stop, max(0, num_old + 1 - len(stop))), len(stop)) for stop in stops)
    found = [(start, start + length) for start, length in starts if start >= 0]
    return min(found, key=lambda span: (span[1], span[0]), default=None)


def _num_open(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    longest = max(map(len, stops)) - 1
    tails = (text[start:] for start in range(max(0, len(text) - longest), len(text)))
    return next((len(tail) for tail in tails if any(stop.startswith(tail) and stop != tail for stop in stops)), 0)


def _backend(tokenizer: Any) -> Tokenizer:  # noqa: ANN401
    """The tokenizers library's object inside."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        kind = type(tokenizer).__name__
        raise ValueError(f"the tokenizer is a {kind}; text is streamed by a fast one, so provide a tokenizer.json")  # noqa: TRY004
    return backend


@lru_cache(maxsize=4)
def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that `skip_special_tokens` leaves out."""
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
