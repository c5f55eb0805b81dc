"""From logits to tokens, one operation a function: bias, masks, penalties, filters, the draw, log-probabilities.

They are applied in this order, which is vLLM's:

    bias and masks · repetition, frequency, presence penalties · temperature · min-p · top-k · top-p · draw

Greedy rows end after the penalties, with the likeliest token. Log-probabilities are those of the logits as the
model gave them. A row's result never depends on the other rows.

Shapes: S rows (sequences), V vocabulary, M (row, token) pairs, N likeliest tokens. Logits are float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gllm_kernels.philox import gumbel

_DRAW_ELEMENTS = 2**20  # noise made at a time: ten rounds of 64-bit words take room


def add_bias(logits_SV: Tensor, rows_M: Tensor, token_ids_M: Tensor, biases_M: Tensor) -> None:
    """Add a bias to some logits, in place; a pair occurs once."""
    add_bias_reference(logits_SV, rows_M, token_ids_M, biases_M)


def mask_tokens(logits_SV: Tensor, rows_M: Tensor, token_ids_M: Tensor) -> None:
    """Shut out some tokens of some rows, in place."""
    mask_tokens_reference(logits_SV, rows_M, token_ids_M)


def penalize(
    logits_SV: Tensor,
    counts_SV: Tensor,
    in_prompt_SV: Tensor,
    *,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    """Logits after the penalties.

    Args:
        logits_SV: before.
        counts_SV: how often the output so far holds each token.
        in_prompt_SV: whether the prompt holds it.
        repetition_S: divides positive logits, and multiplies negative ones, of tokens seen in prompt or output
            (arXiv 1909.05858, section 4.1); 1: off.
        frequency_S: subtracted once per occurrence in the output; 0: off.
        presence_S: subtracted once if the output holds the token; 0: off.
    """
    return penalize_reference(
        logits_SV,
        counts_SV,
        in_prompt_SV,
        repetition_S=repetition_S,
        frequency_S=frequency_S,
        presence_S=presence_S,
    )


def keep_likely(logits_SV: Tensor, *, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """Logits with -inf for the tokens that a filter shuts out; equal logits share one fate, the likeliest always stays.

    Args:
        logits_SV: divided by the temperature already.
        top_k_S: keep the k likeliest; 0 or less: all.
        top_p_S: keep the fewest likeliest whose probabilities, taken among what min-p and top-k left, sum to p or
            more (arXiv 1904.09751); 1: all.
        min_p_S: keep those at least this share as probable as the likeliest (arXiv 2407.01082); 0: all.
    """
    return keep_likely_reference(logits_SV, top_k_S=top_k_S, top_p_S=top_p_S, min_p_S=min_p_S)


def draw(logits_SV: Tensor, seeds_S: Tensor, steps_S: Tensor) -> Tensor:
    """One token a row, int64, with the probabilities softmax(logits): the largest logit after Gumbel noise.

    The noise is a function of the row's seed, the index of its output token and the token id (see philox.py).
    """
    return draw_reference(logits_SV, seeds_S, steps_S)


class TopLogprobs(NamedTuple):
    """The chosen token and then the N likeliest, a row each ([S, 1 + N])."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor  # 1 + how many tokens are likelier


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> TopLogprobs:
    """Log-probabilities and ranks of one token and of the `num_top` likeliest (fewer if the vocabulary is smaller)."""
    return top_logprobs_reference(logits_SV, tokens_S, num_top)


def add_bias_reference(logits_SV: Tensor, rows_M: Tensor, token_ids_M: Tensor, biases_M: Tensor) -> None:
    """Plain torch."""
    logits_SV[rows_M, token_ids_M] += biases_M


def mask_tokens_reference(logits_SV: Tensor, rows_M: Tensor, token_ids_M: Tensor) -> None:
    """Plain torch."""
    logits_SV[rows_M, token_ids_M] = -math.inf


def penalize_reference(
    logits_SV: Tensor,
    counts_SV: Tensor,
    in_prompt_SV: Tensor,
    *,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    """Plain torch."""
    in_output_SV = counts_SV > 0
    factor_SV = torch.where(in_output_SV | in_prompt_SV, repetition_S[:, None], 1.0)
    repeated_SV = torch.where(logits_SV > 0, logits_SV / factor_SV, logits_SV * factor_SV)
    return repeated_SV - frequency_S[:, None] * counts_SV - presence_S[:, None] * in_output_SV


def keep_likely_reference(logits_SV: Tensor, *, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """Plain torch: each filter becomes a smallest logit to keep, found in the sorted row."""
    sorted_SV = logits_SV.sort(dim=-1, descending=True).values
    floor_S1 = sorted_SV[:, :1] + min_p_S[:, None].log()
    floor_S1 = torch.maximum(floor_S1, _kth(sorted_SV, top_k_S))
    floor_S1 = torch.maximum(floor_S1, _nucleus_end(sorted_SV, floor_S1, top_p_S))
    return logits_SV.masked_fill(logits_SV < floor_S1, -math.inf)


def draw_reference(logits_SV: Tensor, seeds_S: Tensor, steps_S: Tensor) -> Tensor:
    """Plain torch, some rows at a time."""
    num_rows, vocab_size = logits_SV.shape
    num_at_once = max(1, _DRAW_ELEMENTS // vocab_size)
    tokens = [
        (logits_SV[rows] + gumbel(seeds_S[rows], steps_S[rows], vocab_size)).argmax(dim=-1)
        for rows in (slice(start, start + num_at_once) for start in range(0, num_rows, num_at_once))
    ]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def top_logprobs_reference(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> TopLogprobs:
    """Plain torch."""
    logprobs_SV = logits_SV.log_softmax(dim=-1)
    own_S1 = logprobs_SV.gather(1, tokens_S[:, None])
    own_rank_S1 = 1 + (logprobs_SV > own_S1).sum(dim=-1, keepdim=True)
    top_SN, ids_SN = logprobs_SV.topk(min(num_top, logprobs_SV.shape[1]), dim=-1)
    ranks_SN = 1 + (top_SN[:, None, :] > top_SN[:, :, None]).sum(dim=-1)
    return TopLogprobs(
        torch.cat((tokens_S[:, None], ids_SN), dim=1),
        torch.cat((own_S1, top_SN), dim=1),
        torch.cat((own_rank_S1, ranks_SN), dim=1),
    )


def _kth(sorted_SV: Tensor, top_k_S: Tensor) -> Tensor:
    """The k-th largest logit of each row, [S, 1]; the smallest where top-k is off."""
    vocab_size = sorted_SV.shape[1]
    place_S = torch.where(top_k_S > 0, top_k_S.clamp(max=vocab_size), vocab_size) - 1
    return sorted_SV.gather(1, place_S[:, None])


def _nucleus_end(sorted_SV: Tensor, floor_S1: Tensor, top_p_S: Tensor) -> Tensor:
    """The smallest logit of the nucleus of what stands at `floor_S1` or above, [S, 1]; -inf where top-p is off."""
    left_SV = sorted_SV.masked_fill(sorted_SV < floor_S1, -math.inf)
    probs_SV = left_SV.softmax(dim=-1).double()
    before_SV = probs_SV.cumsum(dim=-1) - probs_SV  # of the likelier tokens
    before_SV[:, 0] = 0
    num_kept_S1 = (before_SV < top_p_S[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    # A sum that rounds to 1 must not shut out a tail that nobody asked to lose.
    return sorted_SV.gather(1, num_kept_S1 - 1).masked_fill(top_p_S[:, None] >= 1, -math.inf)
