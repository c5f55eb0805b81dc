"""The offline workloads, the same requests for every engine.

    nanoN   N requests, prompt and output uniform in 100..1024 (nano256: 144,831 tokens in, 144,160 out)
    chatN   N requests, log-normal lengths as in chat, prompts of 4..2048, outputs of 4..1024 tokens
            (chat1024: 249,277 in, 201,106 out)

One seeded generator gives all prompt lengths, then all output lengths, then the token ids (100..10000) of one prompt
after another. All requests are there at the start; end-of-sequence tokens are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN_IDS = (100, 10_000)
"""The lowest and the highest id of a prompt's tokens."""

MOST_REQUESTS = 1_000_000


class Shape(NamedTuple):
    """Draws the length of one prompt, or of one output."""

    prompt: Callable[[Random], int]
    output: Callable[[Random], int]


def _uniform(random: Random) -> int:
    return random.randint(100, 1024)


def _log_normal(sigma: float, most: int) -> Callable[[Random], int]:
    return lambda random: min(most, max(4, int(random.lognormvariate(4.9, sigma))))


SHAPES = {
    "nano": Shape(prompt=_uniform, output=_uniform),
    "chat": Shape(prompt=_log_normal(1.1, 2048), output=_log_normal(0.9, 1024)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate after each."""

    name: str
    prompts: list[list[int]]
    num_outputs: list[int]

    @property
    def num_input_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Of all answers."""
        return sum(self.num_outputs)

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(map(int.__add__, map(len, self.prompts), self.num_outputs))


def make_workload(name: str, *, scale: float = 1.0, vocab_size: int | None = None, seed: int = 0) -> Workload:
    """The workload of that name.

    Args:
        name: `nanoN` or `chatN`.
        scale: lengths are multiplied by it, down to one token; 1 leaves them.
        vocab_size: ids are taken modulo this, for a model with fewer tokens than `TOKEN_IDS` asks for.
        seed: of the lengths and ids; another one only to repeat a measurement on other requests.

    Raises:
        ValueError: there is no such workload.
    """
    match = re.fullmatch(r"([a-z]+)(\d{1,7})", name)
    shape = SHAPES.get(match[1]) if match else None
    if match is None or shape is None or not 0 < int(match[2]) <= MOST_REQUESTS:
        raise ValueError(f"--workload {name!r} is unknown; give nanoN or chatN, such as nano256 or chat1024")
    random, count = Random(seed), range(int(match[2]))
    inputs = [shape.prompt(random) for _ in count]
    outputs = [shape.output(random) for _ in count]
    prompts = [[random.randint(*TOKEN_IDS) for _ in range(length)] for length in inputs]
    if scale != 1.0:
        prompts = [prompt[: max(1, int(len(prompt) * scale))] for prompt in prompts]
        outputs = [max(1, int(length * scale)) for length in outputs]
    return Workload(name=name, prompts=fit_vocabulary(prompts, vocab_size), num_outputs=outputs)


def random_prompts(count: int, num_tokens: int, *, vocab_size: int | None, seed: int) -> list[list[int]]:
    """So many prompts of one length."""
    random = Random(seed)
    prompts = [[random.randint(*TOKEN_IDS) for _ in range(num_tokens)] for _ in range(count)]
    return fit_vocabulary(prompts, vocab_size)


def fit_vocabulary(prompts: list[list[int]], vocab_size: int | None) -> list[list[int]]:
    """The same prompts where the model has all their tokens, else ids modulo its vocabulary."""
    if vocab_size is None or vocab_size > TOKEN_IDS[1]:
        return prompts
    return [[token_id % vocab_size for token_id in prompt] for prompt in prompts]
