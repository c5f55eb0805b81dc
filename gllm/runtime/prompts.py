"""Prompts for traces, which know lengths and block hashes but no words: equal hashes are equal tokens."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

# Not when the first prompt is drawn: numpy loads it lazily, and a Ctrl-C that falls into that is lost for good.
from numpy.random import Generator, Philox

if TYPE_CHECKING:
    from gllm.trace import TraceRequest


def synthesise(request: TraceRequest, number: int, vocab_size: int) -> list[int]:
    """A prompt of the request's length.

    Each of its trace's blocks is drawn from the block's id alone, the rest from the request's number, so that two
    prompts share tokens exactly as far as their ids say.
    """
    size, left = request.hash_block_size, request.num_prompt_tokens
    parts = []
    for block_id in request.hash_ids:
        if left <= 0:
            break
        parts.append(_draw(f"block {block_id}", size, vocab_size)[:left])
        left -= size
    if left > 0:
        parts.append(_draw(f"request {number}", left, vocab_size))
    tokens: list[int] = np.concatenate(parts).tolist()
    return tokens


def _draw(name: str, count: int, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    seed = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")
    return Generator(Philox(seed)).integers(vocab_size, size=count)
