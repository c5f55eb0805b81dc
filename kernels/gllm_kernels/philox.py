"""Random numbers that depend on nothing but their name: Philox-4x32-10, equal to `tl.randint4x` bit by bit.

A counter-based generator is a function of a key and a counter; it has no state to keep or to pass on. So noise named
by (request's seed, index of the output token, token id) is the same in whatever batch, on whatever layout and after a
preemption. One call gives four words: the noise of token v is word v % 4 of philox(seed, v // 4, step).
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), figure 2 and section 4.3.

S: rows; V: vocabulary; G: groups of four tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gllm_kernels.jit import tl, triton

_WORD = 0xFFFFFFFF  # 32 bits; words live in int64 tensors, whose products wrap but keep their low 64 bits
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10

_UNIFORM_SCALE = 2.0**-32 * (1 - 2.0**-24)  # the largest word, which float32 rounds up, must stay below 1
_UNIFORM_SHIFT = 2.0**-33  # half a grain: the smallest word must stay above 0


def philox(seed: Tensor, counter: Tensor, counter_high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox's four words, each in [0, 2**32), for broadcastable int64 tensors.

    `seed` gives both key words; `counter` and `counter_high` are the two low counter words, the others are 0.
    """
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = counter & _WORD, counter_high & _WORD
    c2 = c3 = torch.zeros_like(key_a)
    for _ in range(_NUM_ROUNDS):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = _high(product_b) ^ c1 ^ key_a
        c2 = _high(product_a) ^ c3 ^ key_b
        c1, c3 = product_b & _WORD, product_a & _WORD
        key_a, key_b = (key_a + _KEY_A) & _WORD, (key_b + _KEY_B) & _WORD
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """Float32 in (0, 1) from words in [0, 2**32), evenly spread, and finer than 2**-24 near 0."""
    return word.float().mul_(_UNIFORM_SCALE).add_(_UNIFORM_SHIFT)


def gumbel(seeds_S: Tensor, steps_S: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise float32 [S, V] for the `steps_S`-th output token of the requests with these seeds (both int64)."""
    groups_G = torch.arange((vocab_size + 3) // 4, device=seeds_S.device)
    words_SG4 = torch.stack(philox(seeds_S[:, None], groups_G[None, :], steps_S[:, None]), dim=-1)
    uniform_SV = uniform(words_SG4.flatten(1)[:, :vocab_size])
    # Large noise comes from small exponentials, and a float is fine-grained near 0, not near 1: hence log(1 - u).
    return uniform_SV.neg_().log1p_().neg_().log_().neg_()


def _high(product: Tensor) -> Tensor:
    """The upper word of 64 bits."""
    return (product >> 32) & _WORD


@triton.jit
def philox_words(seed, counter, counter_high):
    """The four words, uint32, in a kernel: of one seed (int64) and step (int64), for a block of counters (int32).

    `tl.randint4x` does the same with twice the instructions: products of 64 bits give both halves at once, and
    what is the same for the whole block is computed once.
    """
    key_a = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_b = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c1 = (counter_high & 0xFFFFFFFF).to(tl.uint32)
    c2 = c1 * 0
    c3 = c2
    for _ in tl.static_range(10):
        product_a = c0.to(tl.uint64) * 0xD2511F53
        product_b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_b >> 32).to(tl.uint32) ^ c1 ^ key_a
        c2 = (product_a >> 32).to(tl.uint32) ^ c3 ^ key_b
        c1 = (product_b & 0xFFFFFFFF).to(tl.uint32)
        c3 = (product_a & 0xFFFFFFFF).to(tl.uint32)
        key_a = tl.add(key_a, 0x9E3779B9, sanitize_overflow=False)
        key_b = tl.add(key_b, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform_of(words):
    """Float32 in (0, 1), in a kernel: `uniform`, with its two numbers."""
    return words.to(tl.float32) * 2.3283062976456e-10 + 1.16415321826935e-10
