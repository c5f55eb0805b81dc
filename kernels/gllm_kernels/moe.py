"""A layer of experts: each token visits the few that its router chose (arXiv 2101.03961, 2401.04088).

Up to four launches, none of which waits for the host: sort the choices by expert; a grouped product with the experts'
gate and up matrices, SiLU in its epilogue; a grouped product with their down matrices; a weighted sum over each token's
choices. A block of a grouped product is up to BLOCK_M choices of one expert; how many blocks there are is known on the
device alone, so the grid has the most there can be, and those too many exit at once.

Shapes: T tokens, D hidden size, A experts chosen per token, X experts held here, I width of one (or of a slice),
C = T * A choices; in a product, M choices of a block, N rows of an expert's matrix, K the size summed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton
from gllm_kernels.silu_and_mul import silu_and_mul_reference

if TYPE_CHECKING:
    from torch import Tensor


class Tiles(NamedTuple):
    """How one grouped product is cut into programs."""

    block_m: int  # choices
    block_n: int  # rows of the expert's matrix; of gate_up, half of them gate rows
    block_k: int
    group_m: int  # blocks of choices whose programs are neighbours, and so share weights in the L2 cache
    num_warps: int
    num_stages: int


def experts(
    x_TD: Tensor,
    gate_up_XID: Tensor,
    down_XDI: Tensor,
    weights_TA: Tensor,
    ids_TA: Tensor,
    *,
    first_expert: int,
    num_experts: int | None = None,
) -> Tensor:
    """Sum over each token's chosen experts of weight * down(silu(gate) * up); those not held here add nothing.

    Args:
        x_TD: hidden states.
        gate_up_XID: each expert's gate rows, then its up rows ([X, 2I, D]).
        down_XDI: each expert's way back.
        weights_TA: float32 weight of each choice.
        ids_TA: int32 or int64 choices, counted over all experts of the layer; a token's are distinct.
        first_expert: the number of the first expert held here.
        num_experts: experts of the whole layer, by default those held; only speed depends on it.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a tensor is not contiguous.
    """
    _check(x_TD, gate_up_XID, down_XDI, weights_TA, ids_TA)
    if runs_triton(x_TD):
        return experts_triton(
            x_TD, gate_up_XID, down_XDI, weights_TA, ids_TA, first_expert=first_expert, num_experts=num_experts
        )
    return experts_reference(x_TD, gate_up_XID, down_XDI, weights_TA, ids_TA, first_expert=first_expert)


def _check(x_TD: Tensor, gate_up_XID: Tensor, down_XDI: Tensor, weights_TA: Tensor, ids_TA: Tensor) -> None:
    if x_TD.dim() != 2 or down_XDI.dim() != 3 or ids_TA.dim() != 2:
        raise ValueError("hidden states and choices must have 2 dimensions, weights of experts 3")
    num_tokens, hidden_size = x_TD.shape
    num_held, _, width = down_XDI.shape
    if tuple(down_XDI.shape) != (num_held, hidden_size, width):
        raise ValueError(f"down must be [X, {hidden_size}, I], not {tuple(down_XDI.shape)}")
    if tuple(gate_up_XID.shape) != (num_held, 2 * width, hidden_size):
        raise ValueError(f"gate_up must be {(num_held, 2 * width, hidden_size)}, not {tuple(gate_up_XID.shape)}")
    if len(ids_TA) != num_tokens or weights_TA.shape != ids_TA.shape:
        raise ValueError(f"{num_tokens} tokens need as many choices: {tuple(ids_TA.shape)}, {tuple(weights_TA.shape)}")
    if not x_TD.dtype == gate_up_XID.dtype == down_XDI.dtype:
        raise ValueError(f"one dtype for all products: {x_TD.dtype}, {gate_up_XID.dtype}, {down_XDI.dtype}")
    if weights_TA.dtype != torch.float32 or ids_TA.dtype not in {torch.int32, torch.int64}:
        raise ValueError(f"weights are float32, choices int32 or int64: {weights_TA.dtype}, {ids_TA.dtype}")
    if not all(tensor.is_contiguous() for tensor in (x_TD, gate_up_XID, down_XDI, weights_TA, ids_TA)):
        raise ValueError("all tensors must be contiguous")


def experts_reference(
    x_TD: Tensor, gate_up_XID: Tensor, down_XDI: Tensor, weights_TA: Tensor, ids_TA: Tensor, *, first_expert: int
) -> Tensor:
    """Plain torch: expert by expert, over the tokens that chose it; sums in float32."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(len(gate_up_XID)):
        token, choice = torch.where(ids_TA == first_expert + expert)
        if len(token):
            hidden_tI = silu_and_mul_reference(functional.linear(x_TD[token], gate_up_XID[expert]))
            y_tD = functional.linear(hidden_tI, down_XDI[expert]).float()
            out_TD.index_add_(0, token, y_tD * weights_TA[token, choice, None])
    return out_TD.to(x_TD.dtype)


# Tiles of the products with gate_up and with down, each pair up to a mean number of choices of an expert. Few choices:
# weights come at the memory's pace, and a block should hold all choices of its expert, or its weights are read again:
# with a mean near the block's most, half of the experts need two.
# Many: the tensor cores' pace, in the largest tiles that the registers hold.
TILES = (
    (0.25, (Tiles(16, 32, 128, 8, 4, 4), Tiles(16, 32, 128, 8, 4, 4))),
    (8, (Tiles(16, 64, 128, 8, 4, 4), Tiles(16, 64, 128, 8, 4, 4))),
    (20, (Tiles(32, 64, 128, 8, 4, 4), Tiles(32, 64, 128, 8, 4, 4))),
    (56, (Tiles(64, 128, 64, 8, 4, 4), Tiles(64, 128, 64, 8, 4, 4))),
    (float("inf"), (Tiles(128, 256, 64, 8, 8, 4), Tiles(128, 256, 64, 8, 8, 4))),
)
FLOAT32_TILES = (Tiles(16, 64, 32, 8, 4, 2), Tiles(16, 64, 32, 8, 4, 2))


def choose_tiles(choices_per_expert: float, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Tiles of the products with gate_up and with down, by the mean number of choices of an expert."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    return next(tiles for most, tiles in TILES if choices_per_expert <= most)


def experts_triton(
    x_TD: Tensor,
    gate_up_XID: Tensor,
    down_XDI: Tensor,
    weights_TA: Tensor,
    ids_TA: Tensor,
    *,
    first_expert: int,
    num_experts: int | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """Triton kernels; `tiles` in place of those that `choose_tiles` would."""
    num_tokens, num_chosen = ids_TA.shape
    num_held, hidden_size, width = down_XDI.shape
    num_choices, num_experts = num_tokens * num_chosen, num_experts or num_held
    gate_up_tiles, down_tiles = tiles or choose_tiles(num_choices / num_experts, x_TD.dtype)

    # Few choices seldom meet in one expert, one token's never: each is a block of its own, in the order they come.
    sort = num_tokens > 1 and 4 * num_choices > num_experts
    order_C, starts_X = _sort(ids_TA, num_held, first_expert) if sort else (ids_TA, ids_TA)
    choices = Choices(ids_TA, order_C, starts_X, num_choices, num_chosen, first_expert, sort)
    hidden_CI, y_CD = x_TD.new_empty(num_choices, width), x_TD.new_empty(num_choices, hidden_size)
    _grouped_product(x_TD, gate_up_XID, hidden_CI, choices, gate_up_tiles, gated=True)
    _grouped_product(hidden_CI, down_XDI, y_CD, choices, down_tiles, gated=False)

    out_TD = torch.empty_like(x_TD)
    block, num_warps = (256, 1) if num_tokens < 32 else (1024, 4)  # 16 bytes of each choice for each thread
    _combine_kernel[num_tokens, -(-hidden_size // block)](
        y_CD, weights_TA, ids_TA, out_TD, first_expert, num_held, num_chosen, hidden_size, block, num_warps=num_warps
    )
    return out_TD


class Choices(NamedTuple):
    """What the grouped products know of the router's choices."""

    ids_TA: Tensor
    order_C: Tensor  # choices (token * A + place) by expert, where sorted
    starts_X: Tensor  # [X + 1] where each held expert's choices start in that order; the last is where all end
    num_choices: int
    num_chosen: int
    first_expert: int
    sorted: bool


def _sort(ids_TA: Tensor, num_held: int, first_expert: int) -> tuple[Tensor, Tensor]:
    """The choices of held experts in the experts' order, and where each expert's start; int32."""
    num_tokens, num_chosen = ids_TA.shape
    num_choices = num_tokens * num_chosen
    order_C = torch.empty(num_choices, dtype=torch.int32, device=ids_TA.device)
    starts_X = torch.empty(num_held + 1, dtype=torch.int32, device=ids_TA.device)
    block = min(8192, max(1024, next_power_of_2(num_choices)))
    _sort_kernel[num_held,](
        ids_TA, order_C, starts_X, num_tokens, first_expert, num_chosen, block, num_warps=max(4, block // 512)
    )
    return order_C, starts_X


def _grouped_product(
    a_MK: Tensor, b_XNK: Tensor, out_MN: Tensor, choices: Choices, tiles: Tiles, *, gated: bool
) -> None:
    """Each choice's row times its expert's matrix; gated: tokens' rows in, sorted rows out, else the way back."""
    num_held, num_rows, size = b_XNK.shape
    num_blocks = choices.num_choices
    if choices.sorted:  # each expert's last block may be filled with a single choice
        num_blocks = (num_blocks + min(num_held, num_blocks) * (tiles.block_m - 1)) // tiles.block_m
    _product_kernel[num_blocks * -(-num_rows // tiles.block_n),](
        a_MK,
        b_XNK,
        out_MN,
        choices.ids_TA,
        choices.order_C,
        choices.starts_X,
        num_blocks,
        choices.first_expert,
        A=choices.num_chosen,
        X=num_held,
        N=num_rows,
        K=size,
        GATED=gated,
        SORTED=choices.sorted,
        BLOCK_X=next_power_of_2(num_held),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP_M=tiles.group_m,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@triton.jit(do_not_specialize=["num_tokens", "first_expert"])
def _sort_kernel(ids_ptr, order_ptr, starts_ptr, num_tokens, first_expert, A: tl.constexpr, BLOCK: tl.constexpr):
    """One held expert: count the choices of those before it, then write its own, in the order they come."""
    expert = tl.program_id(0)
    own = first_expert + expert
    num_choices = num_tokens * A  # where A is even, whole vectors of choices are inside or outside
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    tile = 0
    while tile * BLOCK < num_choices:
        choice = tile * BLOCK + lane
        id_ = tl.load(ids_ptr + choice, mask=choice < num_choices, other=-1).to(tl.int32)
        before += ((id_ >= first_expert) & (id_ < own)).to(tl.int32)
        tile += 1
    end = tl.sum(before, axis=0)
    tl.store(starts_ptr + expert, end)
    tile = 0
    while tile * BLOCK < num_choices:
        choice = tile * BLOCK + lane
        id_ = tl.load(ids_ptr + choice, mask=choice < num_choices, other=-1).to(tl.int32)
        is_own = (id_ == own).to(tl.int32)
        tl.store(order_ptr + end + tl.cumsum(is_own, axis=0) - 1, choice, mask=is_own != 0)
        end += tl.sum(is_own, axis=0)
        tile += 1
    if expert + 1 == tl.num_programs(0):
        tl.store(starts_ptr + expert + 1, end)


@triton.jit(do_not_specialize=["num_blocks", "first_expert"])
def _product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    ids_ptr,
    order_ptr,
    starts_ptr,
    num_blocks,
    first_expert,
    A: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One block of choices of one expert times BLOCK_N rows of its matrix; gate and up rows take turns."""
    # Programs that run at one time are GROUP_M blocks by some columns: they share weights and rows in the L2 cache.
    program = tl.program_id(0)
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP_M * num_columns)
    group_size = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * num_columns)
    block = group * GROUP_M + within % group_size
    column = within // group_size

    if SORTED:
        expert, row, stop = _segment(starts_ptr, block, X, BLOCK_X, BLOCK_M)
    else:
        expert, row, stop = tl.load(ids_ptr + block).to(tl.int32) - first_expert, block, block + 1
    if (expert < 0) | (expert >= X):
        return
    row_M = row + tl.arange(0, BLOCK_M)
    is_live_M = row_M < stop
    choice_M = tl.load(order_ptr + row_M, mask=is_live_M, other=0) if SORTED else row_M
    from_M = (choice_M // A if GATED else row_M).to(tl.int64)
    to_M = (row_M if GATED else choice_M).to(tl.int64)

    n_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_N = tl.minimum(n_N, N - 1)
    if GATED:
        weight_N = weight_N // 2 + weight_N % 2 * (N // 2)
    k_K = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + from_M[:, None] * K + k_K[None, :]
    b_ptrs = b_ptr + expert.to(tl.int64) * (N * K) + weight_N[None, :] * K + k_K[:, None]
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_KN = tl.load(b_ptrs)  # first: it need not wait for the choices
            a_MK = tl.load(a_ptrs, mask=is_live_M[:, None], other=0.0)
        else:
            is_inside_K = k_K < K - first
            b_KN = tl.load(b_ptrs, mask=is_inside_K[:, None], other=0.0)
            a_MK = tl.load(a_ptrs, mask=is_live_M[:, None] & is_inside_K[None, :], other=0.0)
        acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    if GATED:
        gate_MI, up_MI = tl.split(tl.reshape(acc_MN, [BLOCK_M, BLOCK_N // 2, 2]))
        hidden_MI = gate_MI / (1.0 + tl.exp(-gate_MI)) * up_MI
        i_I = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        to_ptrs = out_ptr + to_M[:, None] * (N // 2) + i_I[None, :]
        tl.store(to_ptrs, hidden_MI.to(out_ptr.dtype.element_ty), mask=is_live_M[:, None] & (i_I < N // 2)[None, :])
    else:
        to_ptrs = out_ptr + to_M[:, None] * N + n_N[None, :]
        tl.store(to_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=is_live_M[:, None] & (n_N < N)[None, :])


@triton.jit
def _segment(starts_ptr, block, X: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr):
    """A block's expert (X or more: none), its first row in the sorted order, and where its expert's rows end."""
    lane_X = tl.arange(0, BLOCK_X)
    start_X = tl.load(starts_ptr + lane_X, mask=lane_X < X, other=0)
    stop_X = tl.load(starts_ptr + lane_X + 1, mask=lane_X < X, other=0)
    num_blocks_X = (stop_X - start_X + BLOCK_M - 1) // BLOCK_M
    is_before_X = tl.cumsum(num_blocks_X, axis=0) <= block
    expert = tl.sum(is_before_X.to(tl.int32), axis=0)
    first_block = tl.sum(tl.where(is_before_X, num_blocks_X, 0), axis=0)
    place = tl.minimum(expert, X - 1)
    row = tl.load(starts_ptr + place) + (block - first_block) * BLOCK_M
    return expert, row, tl.load(starts_ptr + place + 1)


@triton.jit(do_not_specialize=["first_expert"])
def _combine_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    first_expert,
    X: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D elements of one token: the weighted sum of its choices; those not held have no rows to read."""
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for a in tl.static_range(A):
        choice = token * A + a
        expert = tl.load(ids_ptr + choice).to(tl.int32) - first_expert
        is_held = (expert >= 0) & (expert < X)
        weight = tl.where(is_held, tl.load(weights_ptr + choice), 0.0)
        sum_D += weight * tl.load(y_ptr + choice * D + d_D, mask=is_held & (d_D < D), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d_D, sum_D.to(out_ptr.dtype.element_ty), mask=d_D < D)
