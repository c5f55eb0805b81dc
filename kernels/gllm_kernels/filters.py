"""Top-k, top-p and min-p as one number a row: the smallest logit that may be drawn.

The filters come in the order min-p, top-k, top-p, and what each keeps are the likeliest tokens, so together they are
a threshold. It is found without sorting and compared with the logits as they are; equal logits share one fate.

    min-p  log(min_p) below the largest logit, times the temperature
    top-k  the largest number that k logits reach
    top-p  the largest number such that the probabilities of the logits that reach it sum to p or more

Shapes: S rows (sequences), R those of them that have a filter, V vocabulary, N slots, B a tile's tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gllm_kernels.draw import check_columns, check_rows
from gllm_kernels.jit import runs_triton, tl, triton

_TILE = 8192  # tokens that a program looks at together
_NUM_WARPS = 32
_LOWEST_BIT = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # of float32's, that such a logit may set


def likely_floors(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    top_k_N: Tensor,
    top_p_N: Tensor,
    min_p_N: Tensor,
) -> Tensor:
    """The smallest logit of each row that its filters keep, float32 [S]; the likeliest token always stays.

    It may lie between the smallest logit kept and the largest one shut out. -inf: all are kept, as in rows that draw
    nothing (temperature 0), which cost next to nothing, as do those whose filters are off.

    Args:
        logits_SV: as the model gave them, float32, bfloat16 or float16; its rows may be parts of longer ones.
        slots_S: int64, which numbers are a row's.
        temperatures_N: float32; probabilities are softmax(logits / temperature).
        top_k_N: int64, keep the k likeliest; 0 or less: all.
        top_p_N: float32, keep the fewest likeliest whose probabilities, taken among what min-p and top-k left, sum to
            p or more (arXiv 1904.09751); 1: all.
        min_p_N: float32, keep those at least this share as probable as the likeliest (arXiv 2407.01082); 0: all.

    Raises:
        ValueError: a shape, type or layout is none of these.
    """
    check_rows(logits_SV, slots_S)
    floats = ((column, torch.float32) for column in (temperatures_N, top_p_N, min_p_N))
    check_columns(len(temperatures_N), (top_k_N, torch.int64), *floats)
    op = likely_floors_triton if runs_triton(logits_SV) else likely_floors_reference
    return op(logits_SV, slots_S, temperatures_N, top_k_N, top_p_N, min_p_N)


def likely_floors_reference(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    top_k_N: Tensor,
    top_p_N: Tensor,
    min_p_N: Tensor,
) -> Tensor:
    """Plain torch: each filter becomes a smallest logit to keep, found in the sorted row; waits for the device."""
    top_k_S, top_p_S, min_p_S = top_k_N[slots_S], top_p_N[slots_S], min_p_N[slots_S]
    filters_S = (temperatures_N[slots_S] > 0) & ((top_k_S > 0) | (top_p_S < 1) | (min_p_S > 0))
    rows = filters_S.nonzero().squeeze(1)
    logits_RV, temperatures_R1 = logits_SV[rows].float(), temperatures_N[slots_S[rows], None]
    sorted_RV = logits_RV.masked_fill(logits_RV.isnan(), -math.inf).sort(dim=-1, descending=True).values
    floors_R1 = _min_p_end(sorted_RV, temperatures_R1, min_p_S[rows, None])
    floors_R1 = torch.maximum(floors_R1, _top_k_end(sorted_RV, top_k_S[rows, None]))
    nucleus_R1 = _nucleus_end(sorted_RV, floors_R1, temperatures_R1, top_p_S[rows, None])
    floors_S = torch.full_like(filters_S, -math.inf, dtype=torch.float32)
    return floors_S.index_copy_(0, rows, torch.maximum(floors_R1, nucleus_R1).squeeze(1))


def likely_floors_triton(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    top_k_N: Tensor,
    top_p_N: Tensor,
    min_p_N: Tensor,
) -> Tensor:
    """One program a row."""
    num_rows, vocab_size = logits_SV.shape
    floors_S = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    if num_rows == 0:
        return floors_S
    _floor_of_row[(num_rows,)](
        logits_SV,
        slots_S,
        temperatures_N,
        top_k_N,
        top_p_N,
        min_p_N,
        floors_S,
        logits_SV.stride(0),
        vocab_size,
        LOWEST_BIT=_LOWEST_BIT[logits_SV.dtype],
        TILE=_TILE,
        num_warps=_NUM_WARPS,
    )
    return floors_S


def _min_p_end(sorted_RV: Tensor, temperatures_R1: Tensor, min_p_R1: Tensor) -> Tensor:
    """The smallest logit that min-p keeps, [R, 1]; -inf where it is off."""
    ends_R1 = sorted_RV[:, :1] + temperatures_R1 * min_p_R1.log()
    return ends_R1.masked_fill(min_p_R1 <= 0, -math.inf)


def _top_k_end(sorted_RV: Tensor, top_k_R1: Tensor) -> Tensor:
    """The k-th largest logit of each row, [R, 1]; -inf where top-k is off."""
    vocab_size = sorted_RV.shape[1]
    ends_R1 = sorted_RV.gather(1, top_k_R1.clamp(1, vocab_size) - 1)
    return ends_R1.masked_fill((top_k_R1 <= 0) | (top_k_R1 >= vocab_size), -math.inf)


def _nucleus_end(sorted_RV: Tensor, floors_R1: Tensor, temperatures_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """The smallest logit of the nucleus of what stands at `floors_R1` or above, [R, 1]; -inf where top-p is off."""
    left_RV = sorted_RV.masked_fill(sorted_RV < floors_R1, -math.inf)
    probs_RV = ((left_RV - sorted_RV[:, :1]).double() / temperatures_R1).softmax(dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV  # of the likelier tokens
    num_kept_R1 = (before_RV < top_p_R1).sum(dim=-1, keepdim=True).clamp(min=1)
    # A sum that rounds to 1 must not shut out a tail that nobody asked to lose.
    return sorted_RV.gather(1, num_kept_R1 - 1).masked_fill(top_p_R1 >= 1, -math.inf)


@triton.jit
def _threshold(image):
    """The float32 of an unsigned integer; the integers' order is that of the floats, and NaN ends either side."""
    bits = tl.where(image >> 31 != 0, image ^ 0x80000000, image ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weights_reaching(
    row_V, vocab_size, low, middle, high, floor, largest, scale, BY_COUNT: tl.constexpr, TILE: tl.constexpr
):
    """How much of the row reaches each of three thresholds: tokens, or their mass (the likeliest's is 1) from `floor`.

    The sums are made in the same order whatever the thresholds, so a higher one never weighs more than a lower one.
    """
    low_B = tl.zeros((TILE,), tl.float32)
    middle_B = tl.zeros((TILE,), tl.float32)
    high_B = tl.zeros((TILE,), tl.float32)
    token_B = tl.arange(0, TILE)
    for start in range(0, vocab_size, TILE):
        is_token_B = start + token_B < vocab_size
        logits_B = tl.load(row_V + start + token_B, mask=is_token_B, other=float("-inf")).to(tl.float32)
        if BY_COUNT:
            weights_B = tl.where(is_token_B, 1.0, 0.0)
        else:
            weights_B = tl.where(logits_B >= floor, tl.exp2((logits_B - largest) * scale), 0.0)
        low_B += tl.where(logits_B >= low, weights_B, 0.0)
        middle_B += tl.where(logits_B >= middle, weights_B, 0.0)
        high_B += tl.where(logits_B >= high, weights_B, 0.0)
    return tl.sum(low_B, axis=0), tl.sum(middle_B, axis=0), tl.sum(high_B, axis=0)


@triton.jit
def _largest_reached(
    row_V,
    vocab_size,
    target,
    floor,
    largest,
    scale,
    BY_COUNT: tl.constexpr,
    LOWEST_BIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest threshold whose weight is at least `target`, -inf if none: its integer image, two bits a pass."""
    image = tl.full((), 0, tl.uint32)
    one = tl.full((), 0x40000000, tl.uint32)
    for _ in range((32 - LOWEST_BIT) // 2):
        low, middle, high = image + one, image + one * 2, image + one * 3
        weight_low, weight_middle, weight_high = _weights_reaching(
            row_V,
            vocab_size,
            _threshold(low),
            _threshold(middle),
            _threshold(high),
            floor,
            largest,
            scale,
            BY_COUNT,
            TILE,
        )
        image = tl.where(weight_low >= target, low, image)
        image = tl.where(weight_middle >= target, middle, image)
        image = tl.where(weight_high >= target, high, image)
        one >>= 2
    # What lies below the images of -inf is NaN: no finite number was reached.
    return tl.where(image > 0x007FFFFF, _threshold(image), float("-inf"))


@triton.jit
def _largest(row_V, vocab_size, TILE: tl.constexpr):
    """The row's largest number; -inf if it has none."""
    largest_B = tl.full((TILE,), float("-inf"), tl.float32)
    token_B = tl.arange(0, TILE)
    for start in range(0, vocab_size, TILE):
        is_token_B = start + token_B < vocab_size
        logits_B = tl.load(row_V + start + token_B, mask=is_token_B, other=float("-inf")).to(tl.float32)
        largest_B = tl.where(logits_B > largest_B, logits_B, largest_B)  # never a NaN
    return tl.max(largest_B, axis=0)


@triton.jit(do_not_specialize_on_alignment=["slots_S"])
def _floor_of_row(
    logits_SV,
    slots_S,
    temperatures_N,
    top_k_N,
    top_p_N,
    min_p_N,
    floors_S,
    row_stride,
    vocab_size,
    LOWEST_BIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row): the filters that are on, one after the other."""
    row = tl.program_id(0)
    slot = tl.load(slots_S + row)
    temperature = tl.load(temperatures_N + slot)
    top_k, top_p, min_p = tl.load(top_k_N + slot), tl.load(top_p_N + slot), tl.load(min_p_N + slot)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    floor = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & (has_top_k | (top_p < 1) | (min_p > 0)):
        row_V = logits_SV + row.to(tl.int64) * row_stride
        largest = _largest(row_V, vocab_size, TILE)
        scale = 1.4426950408889634 / temperature
        if min_p > 0:
            floor = largest + temperature * tl.log(min_p)
        if has_top_k:
            target = top_k.to(tl.float32)
            reached = _largest_reached(
                row_V, vocab_size, target, floor, largest, scale, BY_COUNT=True, LOWEST_BIT=LOWEST_BIT, TILE=TILE
            )
            floor = tl.maximum(floor, reached)
        if top_p < 1:
            everything, _, _ = _weights_reaching(
                row_V, vocab_size, floor, floor, floor, floor, largest, scale, BY_COUNT=False, TILE=TILE
            )
            target = tl.maximum(top_p * everything, 1e-30)  # the likeliest alone weighs 1
            reached = _largest_reached(
                row_V, vocab_size, target, floor, largest, scale, BY_COUNT=False, LOWEST_BIT=LOWEST_BIT, TILE=TILE
            )
            floor = tl.maximum(floor, reached)
        floor = tl.minimum(floor, largest)
    tl.store(floors_S + row, floor)
