"""What happens to logits around the draw: bias, masks and penalties before it, log-probabilities beside it.

All of it is applied in this order, which is vLLM's:

    bias and masks · repetition, frequency, presence penalties · temperature · min-p · top-k · top-p · draw

filters.py has the filters, draw.py the temperature and the draw. Greedy rows end after the penalties, with the
likeliest token. Log-probabilities are those of the logits as the model gave them. A row's result never depends on the
other rows.

Shapes: S rows (sequences), V vocabulary, M (row, token) pairs, N likeliest tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
        logits_SV: before, float32.
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


class TopLogprobs(NamedTuple):
    """The chosen token and then the N likeliest, a row each ([S, 1 + N])."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor  # 1 + how many tokens are likelier


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> TopLogprobs:
    """Log-probabilities and ranks of one token and of the `num_top` likeliest (fewer if the vocabulary is smaller).

    `logits_SV` may be of any float type; what comes of it is float32.
    """
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


def top_logprobs_reference(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> TopLogprobs:
    """Plain torch."""
    logprobs_SV = logits_SV.float().log_softmax(dim=-1)
    own_S1 = logprobs_SV.gather(1, tokens_S[:, None])
    own_rank_S1 = 1 + (logprobs_SV > own_S1).sum(dim=-1, keepdim=True)
    top_SN, ids_SN = logprobs_SV.topk(min(num_top, logprobs_SV.shape[1]), dim=-1)
    ranks_SN = 1 + (top_SN[:, None, :] > top_SN[:, :, None]).sum(dim=-1)
    return TopLogprobs(
        torch.cat((tokens_S[:, None], ids_SN), dim=1),
        torch.cat((own_S1, top_SN), dim=1),
        torch.cat((own_rank_S1, ranks_SN), dim=1),
    )
