"""What a generation gives back: piece by piece to a stream, or whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(NamedTuple):
    """One token at one place: its log-probability under the model, and its rank there (1: the likeliest)."""

    token_id: int
    logprob: float
    rank: int


Logprobs = list[TokenLogprob]
"""The token that stands at a place, then the likeliest ones there in order of rank."""


@dataclass(slots=True)
class Delta:
    """What one step, or several, added to one answer."""

    index: int = 0  # which of a request's `n` answers
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # only what no later token can change
    logprobs: list[Logprobs] | None = None  # one entry a token, where asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    prompt_logprobs: list[Logprobs | None] | None = None  # one entry a prompt token, None for the first; only once


class Logprob(NamedTuple):
    """What the offline API says of one token at one place."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One whole answer."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request with all its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
