"""One token a row: the likeliest, or a draw from softmax(logits / temperature) by the largest logit after Gumbel noise.

The noise is a function of the row's seed, the index of its output token and the token id (see philox.py), so a row's
token never depends on the other rows. Probabilities are never computed, and the logits are read once.

Shapes: S rows (sequences), V vocabulary, N slots, P parts of the vocabulary, G groups of four tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gllm_kernels.jit import num_multiprocessors, runs_triton, tl, triton
from gllm_kernels.philox import gumbel, philox_words, uniform_of

_DRAW_ELEMENTS = 2**20  # noise that the reference makes at a time: ten rounds of 64-bit words take room

_TILE = 1024  # tokens that a program looks at together
_NUM_WARPS = 4
_PROGRAMS_PER_MULTIPROCESSOR = 32  # enough to even out their ends, few enough to hide their beginnings
_MAX_PARTS = 256

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    steps_N: Tensor,
    floors_S: Tensor | None = None,
) -> Tensor:
    """One token a row, int64 [S]; `steps_N` of the random rows' slots goes up by 1.

    Equal scores go to the lowest id; a NaN never wins, and a row of nothing but NaN or -inf gives token 0.

    Args:
        logits_SV: float32, bfloat16 or float16; its rows may be parts of longer ones.
        slots_S: int64, which numbers are a row's; two random rows never share a slot.
        temperatures_N: float32; 0: the likeliest token, whatever the seed and the floor.
        seeds_N: int64, all 64 bits count.
        steps_N: int64, the index of the output token that comes next.
        floors_S: float32, the smallest logit that may be drawn (see filters.py); None: all may.

    Raises:
        ValueError: a shape, type or layout is none of these.
    """
    check_rows(logits_SV, slots_S)
    check_columns(len(temperatures_N), (temperatures_N, torch.float32), (seeds_N, torch.int64), (steps_N, torch.int64))
    if floors_S is not None:
        check_columns(len(logits_SV), (floors_S, torch.float32))
    op = draw_triton if runs_triton(logits_SV) else draw_reference
    return op(logits_SV, slots_S, temperatures_N, seeds_N, steps_N, floors_S)


def check_rows(logits_SV: Tensor, slots_S: Tensor) -> None:
    """Refuse logits and slots that no kernel here can read.

    Raises:
        ValueError: a shape, type or layout is wrong.
    """
    if logits_SV.ndim != 2 or logits_SV.shape[1] == 0 or logits_SV.stride(1) != 1 or logits_SV.dtype not in _FLOATS:
        raise ValueError(f"logits must be rows of floats, each without gaps; got {_described(logits_SV)}")
    if slots_S.shape != logits_SV.shape[:1]:
        raise ValueError(f"there are {len(logits_SV)} rows of logits and slots of shape {list(slots_S.shape)}")
    check_columns(len(logits_SV), (slots_S, torch.int64))


def check_columns(length: int, *columns: tuple[Tensor, torch.dtype]) -> None:
    """Refuse numbers, one a row or a slot, that are not `length` of their type side by side.

    Raises:
        ValueError: a shape, type or layout is wrong.
    """
    for column, dtype in columns:
        if column.shape != (length,) or column.dtype != dtype or not column.is_contiguous():
            raise ValueError(f"expected {length} numbers of {dtype} side by side; got {_described(column)}")


def draw_reference(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    steps_N: Tensor,
    floors_S: Tensor | None = None,
) -> Tensor:
    """Plain torch, some rows at a time, and noise only where it counts; waits for the device."""
    slot_temperatures_S = temperatures_N[slots_S]
    random_S = slot_temperatures_S > 0
    tokens_S = _likeliest(logits_SV)
    num_at_once = max(1, _DRAW_ELEMENTS // logits_SV.shape[1])
    for rows in random_S.nonzero().squeeze(1).split(num_at_once):
        slots = slots_S[rows]
        scores_RV = logits_SV[rows].float() / slot_temperatures_S[rows, None]
        scores_RV += gumbel(seeds_N[slots], steps_N[slots], logits_SV.shape[1])
        if floors_S is not None:
            scores_RV.masked_fill_(logits_SV[rows].float() < floors_S[rows, None], -math.inf)
        tokens_S[rows] = _likeliest(scores_RV)
    steps_N.index_add_(0, slots_S, random_S.long())
    return tokens_S


def draw_triton(
    logits_SV: Tensor,
    slots_S: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    steps_N: Tensor,
    floors_S: Tensor | None = None,
) -> Tensor:
    """Two kernels: the best token of each part of the vocabulary, then of each row."""
    num_rows, vocab_size = logits_SV.shape
    device = logits_SV.device
    tokens_S = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return tokens_S
    num_tiles = -(-vocab_size // _TILE)
    wanted = min(_MAX_PARTS, -(-num_multiprocessors(device) * _PROGRAMS_PER_MULTIPROCESSOR // num_rows))
    tiles_per_part = -(-num_tiles // min(wanted, num_tiles))
    num_parts = -(-num_tiles // tiles_per_part)
    scores_SP = torch.empty(num_rows, num_parts, dtype=torch.float32, device=device)
    tokens_SP = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    _best_of_part[num_parts, num_rows](
        logits_SV,
        slots_S,
        temperatures_N,
        seeds_N,
        steps_N,
        floors_S,
        scores_SP,
        tokens_SP,
        logits_SV.stride(0),
        vocab_size,
        tiles_per_part,
        NUM_GROUPS=_TILE // 4,
        IS_APPROXIMATE=not logits_SV.is_cpu,
        num_warps=_NUM_WARPS,
    )
    _best_of_row[(num_rows,)](
        scores_SP,
        tokens_SP,
        slots_S,
        temperatures_N,
        steps_N,
        tokens_S,
        num_parts,
        MAX_PARTS=_MAX_PARTS,
        num_warps=1,
    )
    return tokens_S


def _likeliest(scores_SV: Tensor) -> Tensor:
    return scores_SV.masked_fill(scores_SV.isnan(), -math.inf).argmax(dim=-1)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}"


@triton.jit
def _minus_log2(x, IS_APPROXIMATE: tl.constexpr):
    """-log2(x) of positive normal numbers; approximately: one instruction, off by 2**-22 (near 1: absolutely)."""
    if IS_APPROXIMATE:
        # The sign is changed here, where the assembler makes it part of whatever uses it.
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; neg.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - the compiler takes one branch
        return -tl.log2(x)


@triton.jit
def _gumbel_base2(seed, step, groups_G, NUM_GROUPS: tl.constexpr, IS_APPROXIMATE: tl.constexpr):
    """Gumbel noise in units of ln 2, up to a constant that no choice depends on, [G, 4]."""
    word_0, word_1, word_2, word_3 = philox_words(seed, groups_G, step)
    words_G4 = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape((NUM_GROUPS, 4))
    u_G4 = uniform_of(words_G4)
    # -log2(1 - u): by its series where 1 - u has lost u's digits. It leaves off u**5 / 5, less than 2e-7 of the whole.
    series_G4 = 0.4808983469629878 + u_G4 * 0.3606737602222409
    series_G4 = u_G4 * (1.4426950408889634 + u_G4 * (0.7213475204444817 + u_G4 * series_G4))
    exponential_G4 = tl.where(u_G4 < 0.03125, series_G4, _minus_log2(1 - u_G4, IS_APPROXIMATE))
    return _minus_log2(exponential_G4, IS_APPROXIMATE)


@triton.jit(do_not_specialize=["tiles_per_part"], do_not_specialize_on_alignment=["slots_S"])
def _best_of_part(
    logits_SV,
    slots_S,
    temperatures_N,
    seeds_N,
    steps_N,
    floors_S,
    scores_SP,
    tokens_SP,
    row_stride,
    vocab_size,
    tiles_per_part,
    NUM_GROUPS: tl.constexpr,
    IS_APPROXIMATE: tl.constexpr,
):
    """Program (part, row): the best score among the part's tokens, and the lowest token that has it.

    Four tokens in a line of the block, as Philox gives them: loads of four stand where the words are made.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_S + row)
    temperature = tl.load(temperatures_N + slot)
    row_V = logits_SV + row.to(tl.int64) * row_stride
    group_G = tl.arange(0, NUM_GROUPS)
    lane_G4 = group_G[:, None] * 4 + tl.arange(0, 4)[None, :]
    best_G4 = tl.full((NUM_GROUPS, 4), float("-inf"), tl.float32)
    first = part * tiles_per_part * NUM_GROUPS * 4
    start_G4 = tl.full((NUM_GROUPS, 4), 0, tl.int32) + first  # of the tile that holds a lane's best
    end = tl.minimum(first + tiles_per_part * NUM_GROUPS * 4, vocab_size)
    if temperature > 0:
        scale = 1.4426950408889634 / temperature  # to units of ln 2, as the noise
        seed, step = tl.load(seeds_N + slot), tl.load(steps_N + slot)
        if floors_S is not None:
            floor = tl.load(floors_S + row)
        for start in range(first, end, NUM_GROUPS * 4):
            is_token_G4 = start + lane_G4 < vocab_size
            logits_G4 = tl.load(row_V + start + lane_G4, mask=is_token_G4, other=float("-inf")).to(tl.float32)
            noise_G4 = _gumbel_base2(seed, step, start // 4 + group_G, NUM_GROUPS, IS_APPROXIMATE)
            scores_G4 = logits_G4 * scale + noise_G4
            if floors_S is not None:
                scores_G4 = tl.where(logits_G4 >= floor, scores_G4, float("-inf"))
            is_better_G4 = scores_G4 > best_G4  # never of a NaN
            best_G4 = tl.where(is_better_G4, scores_G4, best_G4)
            start_G4 = tl.where(is_better_G4, start, start_G4)
    else:
        for start in range(first, end, NUM_GROUPS * 4):
            is_token_G4 = start + lane_G4 < vocab_size
            logits_G4 = tl.load(row_V + start + lane_G4, mask=is_token_G4, other=float("-inf")).to(tl.float32)
            is_better_G4 = logits_G4 > best_G4
            best_G4 = tl.where(is_better_G4, logits_G4, best_G4)
            start_G4 = tl.where(is_better_G4, start, start_G4)
    best = tl.max(tl.max(best_G4, axis=1), axis=0)
    tokens_G4 = tl.where(best_G4 == best, start_G4 + lane_G4, 2147483647)
    place = row * tl.num_programs(0) + part
    tl.store(scores_SP + place, best)
    tl.store(tokens_SP + place, tl.min(tl.min(tokens_G4, axis=1), axis=0))


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=["slots_S"])
def _best_of_row(scores_SP, tokens_SP, slots_S, temperatures_N, steps_N, tokens_S, num_parts, MAX_PARTS: tl.constexpr):
    """Program (row): the best of its parts; a random row's step goes up."""
    row = tl.program_id(0)
    part_P = tl.arange(0, MAX_PARTS)
    scores_P = tl.load(scores_SP + row * num_parts + part_P, mask=part_P < num_parts, other=float("-inf"))
    tokens_P = tl.load(tokens_SP + row * num_parts + part_P, mask=part_P < num_parts, other=2147483647)
    best = tl.max(scores_P, axis=0)
    tl.store(tokens_S + row, tl.min(tl.where(scores_P == best, tokens_P, 2147483647), axis=0).to(tl.int64))
    slot = tl.load(slots_S + row)
    if tl.load(temperatures_N + slot) > 0:
        tl.store(steps_N + slot, tl.load(steps_N + slot) + 1)
