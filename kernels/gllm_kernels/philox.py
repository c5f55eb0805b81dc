"""Random numbers that depend on nothing but their name: Philox-4x32-10, equal to `triton.language.rand` bit by bit.

A counter-based generator is a function of a key and a counter; it has no state to keep or to pass on. So noise named
by (request's seed, index of the output token, token id) is the same in whatever batch, on whatever layout and after a
preemption. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), figure 2 and section 4.3.

S: rows; V: vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF  # 32 bits; words live in int64 tensors, whose products wrap but keep their low 64 bits
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10
_UNIFORM_SCALE = 4.6566127342e-10  # just under 2**-31, so that the largest word stays below 1 in float32


def philox(seed: Tensor, counter: Tensor, counter_high: Tensor) -> Tensor:
    """The first of Philox's four words, in [0, 2**32), for broadcastable int64 tensors.

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
    return c0


def uniform(seed: Tensor, counter: Tensor, counter_high: Tensor) -> Tensor:
    """Float32 in [0, 1): what `tl.rand(seed, offset)` gives at offset = counter_high * 2**32 + counter."""
    word = philox(seed, counter, counter_high)
    folded = torch.where(word >= 2**31, _WORD - word, word)  # a negative int32 x stands for -x - 1
    return folded.float() * _UNIFORM_SCALE


def gumbel(seeds_S: Tensor, steps_S: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise float32 [S, V] for the `steps_S`-th output token of the requests with these seeds (both int64)."""
    token_ids_V = torch.arange(vocab_size, device=seeds_S.device)
    noise_SV = uniform(seeds_S[:, None], token_ids_V[None, :], steps_S[:, None])
    # Large noise comes from small exponentials, and a float is fine-grained near 0, not near 1. The shift by half
    # a grain keeps 0, which one word in 2**31 gives, from becoming an infinite noise that beats every logit.
    return noise_SV.add_(2**-32).neg_().log1p_().neg_().log_().neg_()


def _high(product: Tensor) -> Tensor:
    """The upper word of 64 bits."""
    return (product >> 32) & _WORD
