"""The router of a layer of experts: which experts each token visits, and how much each counts (arXiv 2101.03961).

Shapes: T tokens, X experts of the whole layer, A experts chosen per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor


def route(
    scores_TX: Tensor, num_chosen: int, *, normalised: bool, slot_mapping_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax in float32, then the likeliest experts, the likeliest first; of equal ones the lowest numbers.

    A row with NaN has some valid choices, and NaN for weights. One of padding visits no expert, so that none is read
    for it: its choices are -1, its weights 0.

    Args:
        scores_TX: the router's output.
        num_chosen: A.
        normalised: whether each token's weights are divided by their sum.
        slot_mapping_T: int64; where each token has its place in the cache, padding has a negative number. None: there
            is no padding.

    Returns:
        Weights (float32) and numbers (int32) of the chosen experts, [T, A] each.

    Raises:
        ValueError: scores are no contiguous floating-point matrix, there are fewer experts than chosen, or the slot
            mapping is not one int64 for each token.
    """
    if scores_TX.dim() != 2 or not scores_TX.is_contiguous():
        raise ValueError(f"scores must be a contiguous [tokens, experts] tensor, not {tuple(scores_TX.shape)}")
    if not scores_TX.is_floating_point():
        raise ValueError(f"scores must be floating-point numbers, not {scores_TX.dtype}")
    if not 0 < num_chosen <= scores_TX.shape[1]:
        raise ValueError(f"each token chooses 1 to {scores_TX.shape[1]} experts, not {num_chosen}")
    if slot_mapping_T is not None:
        shape, dtype = tuple(slot_mapping_T.shape), slot_mapping_T.dtype
        if shape != (len(scores_TX),) or dtype != torch.int64 or not slot_mapping_T.is_contiguous():
            raise ValueError(f"the slot mapping must be [{len(scores_TX)}] of int64 in a row, not {shape}, {dtype}")
    implementation = route_triton if runs_triton(scores_TX) else route_reference
    return implementation(scores_TX, num_chosen, normalised=normalised, slot_mapping_T=slot_mapping_T)


def route_reference(
    scores_TX: Tensor, num_chosen: int, *, normalised: bool, slot_mapping_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain torch; orders by the scores themselves, since softmax makes ties of scores far below the greatest."""
    scores_TX = scores_TX.float()
    ids_TA = scores_TX.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    weights_TA = scores_TX.softmax(-1).gather(-1, ids_TA)
    if normalised:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    if slot_mapping_T is not None:
        is_padding_T1 = slot_mapping_T[:, None] < 0
        weights_TA, ids_TA = weights_TA.masked_fill(is_padding_T1, 0.0), ids_TA.masked_fill(is_padding_T1, -1)
    return weights_TA, ids_TA.int()


def route_triton(
    scores_TX: Tensor, num_chosen: int, *, normalised: bool, slot_mapping_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One Triton kernel, a warp or more for each token."""
    num_tokens, num_experts = scores_TX.shape
    weights_TA = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=scores_TX.device)
    ids_TA = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=scores_TX.device)
    block = next_power_of_2(num_experts)
    _route_kernel[num_tokens,](
        scores_TX,
        slot_mapping_T,
        weights_TA,
        ids_TA,
        X=num_experts,
        A=num_chosen,
        NORMALISED=normalised,
        BLOCK_X=block,
        BLOCK_A=next_power_of_2(num_chosen),
        num_warps=max(1, min(8, block // 256)),
    )
    return weights_TA, ids_TA


@triton.jit
def _route_kernel(
    scores_ptr,
    slot_mapping_ptr,
    weights_ptr,
    ids_ptr,
    X: tl.constexpr,
    A: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """One token: its scores stay in registers, and the greatest is taken out A times."""
    row = tl.program_id(0).to(tl.int64)
    lane_X = tl.arange(0, BLOCK_X)
    score_X = tl.load(scores_ptr + row * X + lane_X, mask=lane_X < X, other=float("-inf")).to(tl.float32)
    top = tl.max(score_X, axis=0)
    total = tl.sum(tl.exp(score_X - top), axis=0)  # NaN where any score is, or the greatest is infinite

    # What may be chosen is finite, so that -inf marks what may not: padding, and what has been chosen before.
    least = -3.4028234663852886e38
    rank_X = tl.where(score_X == score_X, tl.maximum(score_X, least), least)  # noqa: PLR0124 - false for NaN
    rank_X = tl.where(lane_X < X, rank_X, float("-inf"))
    lane_A = tl.arange(0, BLOCK_A)
    best_A = tl.full([BLOCK_A], float("-inf"), tl.float32)
    id_A = tl.zeros([BLOCK_A], tl.int32)
    for choice in tl.static_range(A):
        best, index = tl.max(rank_X, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best_A = tl.where(lane_A == choice, best, best_A)
        id_A = tl.where(lane_A == choice, index, id_A)
        rank_X = tl.where(lane_X == index, float("-inf"), rank_X)

    weight_A = tl.exp(best_A - top) / total
    if NORMALISED:
        weight_A = weight_A / tl.sum(tl.where(lane_A < A, weight_A, 0.0), axis=0)
    if slot_mapping_ptr is not None:
        is_padding = tl.load(slot_mapping_ptr + row) < 0
        weight_A = tl.where(is_padding, 0.0, weight_A)
        id_A = tl.where(is_padding, -1, id_A)
    tl.store(weights_ptr + row * A + lane_A, weight_A, mask=lane_A < A)
    tl.store(ids_ptr + row * A + lane_A, id_A, mask=lane_A < A)
