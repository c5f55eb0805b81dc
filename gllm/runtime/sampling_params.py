"""How a client wants its tokens chosen and its answer ended: `SamplingParams`, with the names and defaults of vLLM."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options that a model's generation_config.json has a say in, where a request is silent."""

_T = TypeVar("_T")

MAX_LOGPROBS = 20
"""The most alternatives a client may ask for at one place."""

GREEDY_BELOW = 1e-5
"""Temperatures below this choose the likeliest token: dividing by them would overflow."""


class _Range(NamedTuple):
    """Which numbers an option takes."""

    low: float
    high: float = math.inf
    above: bool = False  # `low` itself is refused
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        fits = value < 2**63 if self.whole else -math.inf < value < math.inf  # a message field holds 64 bits
        return fits and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} {'above' if self.above else 'of at least'} {self.low:g}"
        low = f"above {self.low:g} and at most" if self.above else f"from {self.low:g} to"
        return f"{kind} {low} {self.high:g}"


_RANGES = {
    "n": _Range(1, whole=True),
    "temperature": _Range(0),
    "top_p": _Range(0, 1, above=True),
    "top_k": _Range(-1, whole=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, above=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "min_tokens": _Range(0, whole=True),
}
_RANGES_OR_NONE = {
    "max_tokens": _Range(1, whole=True),
    "logprobs": _Range(0, MAX_LOGPROBS, whole=True),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS, whole=True),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize")
_TOKEN_ID = _Range(0, whole=True)
_BIAS = _Range(-100, 100)
_SEED = range(-(2**63), 2**64)  # what one message field holds


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling options.

    `stop`, `stop_token_ids` and `logit_bias` are kept as tuples and a dict whatever they were given as;
    `stop_strings` is `stop` under its final type. `n` answers at temperature 0 are equal.

    Raises:
        ValueError: an option is out of its range, or two contradict each other.
    """

    n: int = 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # None or -1: another one each time
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the model has room for
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives beside each token of the answer; 0: the token's own alone
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_flags()
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("seed", _seed(self.seed))
        self._check_together()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, as the tuple it has become."""
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the seed."""
        return self.temperature < GREEDY_BELOW

    @property
    def needs_penalties(self) -> bool:
        """Whether choosing a token depends on which ones came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_filter(self) -> bool:
        """Whether unlikely tokens are shut out before the draw; a greedy choice never meets them."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def seed_of(self, index: int) -> int:
        """The seed of answer `index` of `n`, in [0, 2**64); a fresh one if the client named none."""
        return secrets.randbits(63) if self.seed is None else (self.seed + index) % 2**64

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            ValueError: a stop token or a biased token is outside the vocabulary.
        """
        for option, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids or ():
                if token_id >= vocab_size:
                    raise ValueError(f"{option} names token {token_id}; this model's ids end at {vocab_size - 1}")

    def _set(self, option: str, value: object) -> None:
        object.__setattr__(self, option, value)

    def _check_numbers(self) -> None:
        for option, numbers in (_RANGES | _RANGES_OR_NONE).items():
            value = getattr(self, option)
            if value not in numbers and not (value is None and option in _RANGES_OR_NONE):
                raise ValueError(f"{option} is {value!r}; it must be {numbers}")

    def _check_flags(self) -> None:
        for option in _FLAGS:
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} is {getattr(self, option)!r}; it must be true or false")  # noqa: TRY004

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, which is {self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are looked for in the text; they need detokenize to be true")


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings, in their order."""
    strings = (stop,) if isinstance(stop, str) else tuple(_listed("stop", stop))
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop holds {string!r}; each stop string must be a text that is not empty")
    return strings


def _token_ids(ids: Sequence[int] | None) -> tuple[int, ...]:
    """The stop tokens, in their order."""
    token_ids = tuple(_listed("stop_token_ids", ids))
    for token_id in token_ids:
        if token_id not in _TOKEN_ID:
            raise ValueError(f"stop_token_ids holds {token_id!r}; a token id is {_TOKEN_ID}")
    return token_ids


def _listed(option: str, values: Sequence[_T] | None) -> Sequence[_T]:
    """`values` if they are a list of some kind, nothing for None."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence | None):
        raise ValueError(f"{option} is {values!r}; it must be a list")  # noqa: TRY004
    return values or ()


def _biases(biases: Mapping[int, float] | None) -> dict[int, float] | None:
    """The biases by token id; JSON's text keys become numbers. None if there are none."""
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias is {biases!r}; it must map token ids to numbers")  # noqa: TRY004
    numbered = {_bias_key(key): value for key, value in biases.items()}
    for token_id, bias in numbered.items():
        if bias not in _BIAS:
            raise ValueError(f"logit_bias of token {token_id} is {bias!r}; it must be {_BIAS}")
    return numbered or None


def _bias_key(key: object) -> int:
    """One token id of a bias."""
    number = int(key) if isinstance(key, str) and key.isdecimal() else key
    if not isinstance(number, int) or number not in _TOKEN_ID:
        raise ValueError(f"logit_bias names token {key!r}; a token id is {_TOKEN_ID}")
    return number


def _seed(seed: int | None) -> int | None:
    """A seed that fits 64 bits; -1 stands for none, as in vLLM."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in _SEED:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at most 64 bits")
    return None if seed == -1 else seed
