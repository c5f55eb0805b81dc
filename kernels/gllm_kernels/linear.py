"""Products of a few rows with a matrix, as every step of decoding makes them: reading the weights is what counts.

A program takes a block of rows and a block of columns of the output. Where those are too few to fill a GPU, K is split
among several programs too: each leaves a partial sum in float32, and whoever comes last adds them up, always in the
order of K. So a row's result depends neither on who that is nor on the other rows; it depends on the tuning.

Gated, the weights are those of a gated MLP (SwiGLU, arXiv 2002.05202), all of gate above all of up, and a program
reads the same rows of both: silu(x @ gate^T) * (x @ up^T) leaves it without a detour through memory.

Shapes: M rows, K the size summed over, N rows of the weights, C columns of the output (N, or gated N / 2), R rows of a
block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from gllm_kernels.jit import runs_triton, tl, triton
from gllm_kernels.silu_and_mul import silu_and_mul_reference

if TYPE_CHECKING:
    from torch import Tensor

LEAST_DOT = 16  # rows, columns and k of a block that tensor cores multiply


class Tuning(NamedTuple):
    """How a product is cut into programs; the blocks are powers of two."""

    block_m: int  # rows; 1: weights go to registers, all at once, and are multiplied without tensor cores
    block_n: int  # columns of the output; gated, as many rows of either matrix
    block_k: int  # summed over at a time
    split_k: int  # programs that share one block of the output
    num_warps: int
    num_stages: int  # of the pipeline that loads blocks; one is being computed
    tma: bool = False  # whether the tensor memory accelerator (Hopper and later) loads them


class Scratch(NamedTuple):
    """Where programs that share a block meet; calls with one scratch must follow each other on one stream."""

    sums: Tensor  # float32, partial sums
    counters: Tensor  # int32, how many of a block's are there; zero between calls


class Launch(NamedTuple):
    """How the kernel is called: `grid` programs with `arguments`, compiled for `constants`."""

    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def make_scratch(num_rows: int, num_columns: int, tuning: Tuning, device: torch.device) -> Scratch:
    """What such a product needs, or smaller ones with the same blocks.

    Args:
        num_rows: M.
        num_columns: N.
        tuning: of the product.
        device: of the product.
    """
    split = tuning.split_k > 1
    num_blocks = -(-num_rows // tuning.block_m) * -(-num_columns // tuning.block_n)
    return Scratch(
        torch.empty(split * tuning.split_k * num_rows * num_columns, dtype=torch.float32, device=device),
        torch.zeros(split * num_blocks, dtype=torch.int32, device=device),
    )


def linear(
    x_MK: Tensor, w_NK: Tensor, *, tuning: Tuning, scratch: Scratch | None = None, gated: bool = False
) -> Tensor:
    """Rows times w^T, summed in float32, [M, C] in their dtype; gated, silu of the first half of it times the second.

    Args:
        x_MK: rows.
        w_NK: weights; gated, all gate rows, then as many up rows.
        tuning: for these shapes.
        scratch: needed where the tuning splits K (`make_scratch`).
        gated: whether the weights are those of a gated MLP.

    Raises:
        ValueError: shapes, types or layouts that do not fit each other, or a tuning that does not fit them.
    """
    _check(x_MK, w_NK, gated=gated)
    _check_tuning(x_MK, w_NK, tuning, scratch)
    if runs_triton(x_MK):
        return linear_triton(x_MK, w_NK, tuning=tuning, scratch=scratch, gated=gated)
    return linear_reference(x_MK, w_NK, gated=gated)


def _check(x_MK: Tensor, w_NK: Tensor, *, gated: bool) -> None:
    if x_MK.dim() != 2 or w_NK.dim() != 2 or x_MK.shape[1] != w_NK.shape[1] or not x_MK.numel() or not w_NK.numel():
        raise ValueError(f"rows [M, K] and weights [N, K] are needed, not {tuple(x_MK.shape)} and {tuple(w_NK.shape)}")
    if x_MK.dtype != w_NK.dtype or not x_MK.is_floating_point():
        raise ValueError(f"rows and weights must be of one floating-point type, not {x_MK.dtype} and {w_NK.dtype}")
    if not (x_MK.is_contiguous() and w_NK.is_contiguous()):
        raise ValueError(f"rows and weights must be contiguous: strides {x_MK.stride()} and {w_NK.stride()}")
    if gated and len(w_NK) % 2:
        raise ValueError(f"gate and up must have as many rows each: {len(w_NK)} together")


def _check_tuning(x_MK: Tensor, w_NK: Tensor, tuning: Tuning, scratch: Scratch | None) -> None:
    if any(size < 1 or size & (size - 1) for size in tuning[:3]) or tuning.split_k < 1:
        raise ValueError(f"blocks must be powers of two, and K split among at least one program: {tuning}")
    if tuning.block_m > 1 and min(tuning[:3]) < LEAST_DOT:
        raise ValueError(f"blocks of more than one row must be at least {LEAST_DOT} in every direction: {tuning}")
    if tuning.tma and (tuning.block_m == 1 or x_MK.shape[1] * x_MK.element_size() % 16):
        raise ValueError(f"tma needs rows of a multiple of 16 bytes, and blocks of more than one: {tuning}")
    if tuning.split_k > 1:
        needed = make_scratch(len(x_MK), len(w_NK), tuning, torch.device("meta"))
        if scratch is None or any(has.numel() < need.numel() for has, need in zip(scratch, needed, strict=True)):
            raise ValueError(f"to split K, a scratch of {[each.numel() for each in needed]} elements is needed")


def linear_reference(x_MK: Tensor, w_NK: Tensor, *, gated: bool = False) -> Tensor:
    """Plain torch, which rounds gate and up before they are multiplied."""
    out_MN = functional.linear(x_MK, w_NK)
    return silu_and_mul_reference(out_MN) if gated else out_MN


def linear_triton(
    x_MK: Tensor, w_NK: Tensor, *, tuning: Tuning, scratch: Scratch | None = None, gated: bool = False
) -> Tensor:
    """The kernel."""
    out_MC = x_MK.new_empty(len(x_MK), len(w_NK) >> gated)
    grid, arguments, constants = make_launch(out_MC, x_MK, w_NK, tuning=tuning, scratch=scratch, gated=gated)
    linear_kernel[grid](*arguments, **constants)
    return out_MC


def make_launch(
    out_MC: Tensor, x_MK: Tensor, w_NK: Tensor, *, tuning: Tuning, scratch: Scratch | None, gated: bool
) -> Launch:
    """The call of the kernel; from tensors without memory (device "meta"), enough to compile it."""
    (num_rows, size), num_columns = x_MK.shape, out_MC.shape[1]
    scratch = scratch or Scratch(out_MC, out_MC)  # not looked at
    x, w = x_MK, w_NK
    if tuning.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - Triton may be missing

        x = TensorDescriptor.from_tensor(x_MK, [tuning.block_m, tuning.block_k])
        w = TensorDescriptor.from_tensor(w_NK, [tuning.block_n, tuning.block_k])
    # Programs that share a block are neighbours, then those that share weights: they run at about the same time.
    grid = tuning.split_k, -(-num_rows // tuning.block_m), -(-num_columns // tuning.block_n)
    constants = {
        "C": num_columns,
        "K": size,
        "GATED": gated,
        "BLOCK_M": tuning.block_m,
        "BLOCK_N": tuning.block_n,
        "BLOCK_K": tuning.block_k,
        "SPLIT_K": tuning.split_k,
        "TMA": tuning.tma,
        "num_warps": tuning.num_warps,
        "num_stages": tuning.num_stages,
    }
    return Launch(grid, (out_MC, x, w, *scratch, num_rows), constants)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    out_ptr,
    x,
    w,
    sums_ptr,
    counters_ptr,
    num_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """One block of the output, or one part of K of it; `x` and `w` are pointers or, for TMA, descriptors."""
    part = tl.program_id(0)
    row, column = tl.program_id(1) * BLOCK_M, tl.program_id(2) * BLOCK_N
    steps: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    whole_c: tl.constexpr = C % BLOCK_N == 0
    whole_k: tl.constexpr = K % (BLOCK_K * steps * SPLIT_K) == 0
    begin = part * (steps * BLOCK_K)
    if BLOCK_M == 1:
        acc_MN, up_MN = _multiply_row(
            x + row * K, w, column, begin, C, K, GATED, BLOCK_N, BLOCK_K, steps, whole_c, whole_k
        )
    else:
        acc_MN, up_MN = _multiply_block(
            x, w, row, num_rows, column, begin, C, K, GATED, BLOCK_M, BLOCK_N, BLOCK_K, steps, whole_c, whole_k, TMA
        )

    m_M, n_N = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    mask_MN = (m_M < num_rows)[:, None] & (n_N < C)[None, :]
    out_ptrs = out_ptr + m_M[:, None] * C + n_N[None, :]
    if SPLIT_K == 1:
        _finish(out_ptrs, acc_MN, up_MN, mask_MN, GATED)
    else:
        N: tl.constexpr = 2 * C if GATED else C
        sums_ptrs = sums_ptr + m_M[:, None] * N + n_N[None, :]
        part_size = num_rows * N
        tl.store(sums_ptrs + part * part_size, acc_MN, mask=mask_MN)
        if GATED:
            tl.store(sums_ptrs + part * part_size + C, up_MN, mask=mask_MN)
        counter_ptr = counters_ptr + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()  # all of this program's stores come before its announcement
        num_before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if num_before == SPLIT_K - 1:
            tl.store(counter_ptr, 0)
            acc_MN = _sum_parts(sums_ptrs, mask_MN, part_size, SPLIT_K)
            if GATED:
                up_MN = _sum_parts(sums_ptrs + C, mask_MN, part_size, SPLIT_K)
            _finish(out_ptrs, acc_MN, up_MN, mask_MN, GATED)


@triton.jit
def _multiply_block(
    x,
    w,
    row,
    num_rows,
    column,
    begin,
    C: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE_C: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Sums of a block over STEPS blocks of K; gated, of the up rows, too."""
    acc_MN, up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        k = begin + step * BLOCK_K
        w_NK = _load(w, 0, column, C, k, BLOCK_N, K, BLOCK_K, WHOLE_C, WHOLE_K, TMA)
        x_MK = _load(x, 0, row, num_rows, k, BLOCK_M, K, BLOCK_K, WHOLE_R=False, WHOLE_K=WHOLE_K, TMA=TMA)
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision="ieee")
        if GATED:
            up_NK = _load(w, C, column, C, k, BLOCK_N, K, BLOCK_K, WHOLE_C, WHOLE_K, TMA)
            up_MN = tl.dot(x_MK, tl.trans(up_NK), up_MN, input_precision="ieee")
    return acc_MN, up_MN


@triton.jit
def _multiply_row(
    x_ptr,
    w_ptr,
    column,
    begin,
    C: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE_C: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """The same for a block of one row, [1, BLOCK_N].

    Each thread multiplies what it loads: the same places of the row and of some rows of w, added up at the end. No
    barrier before that keeps the loads of all steps from being on their way at once.
    """
    acc_NK, up_acc_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        k = begin + step * BLOCK_K
        w_NK = _load(w_ptr, 0, column, C, k, BLOCK_N, K, BLOCK_K, WHOLE_C, WHOLE_K, TMA=False)
        x_NK = _repeat(x_ptr, k, BLOCK_N, K, BLOCK_K, WHOLE_K).to(tl.float32)
        acc_NK += x_NK * w_NK.to(tl.float32)
        if GATED:
            up_NK = _load(w_ptr, C, column, C, k, BLOCK_N, K, BLOCK_K, WHOLE_C, WHOLE_K, TMA=False)
            up_acc_NK += x_NK * up_NK.to(tl.float32)
    return tl.sum(acc_NK, 1)[None, :], tl.sum(up_acc_NK, 1)[None, :]


@triton.jit
def _load(
    source,
    first,
    row,
    num_rows,
    k,
    BLOCK_R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_R: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """BLOCK_R of `num_rows` rows that begin at row `first`; beyond them no matter what, beyond K zeros."""
    if TMA:
        block_RK = source.load([first + row, k])
    else:
        r_R, k_K = row + tl.arange(0, BLOCK_R), k + tl.arange(0, BLOCK_K)
        pointers = source + (first + r_R).to(tl.int64)[:, None] * K + k_K[None, :]
        if WHOLE_R and WHOLE_K:
            block_RK = tl.load(pointers)
        elif WHOLE_R:
            block_RK = tl.load(pointers, mask=(k_K < K)[None, :], other=0.0)
        elif WHOLE_K:
            block_RK = tl.load(pointers, mask=(r_R < num_rows)[:, None], other=0.0)
        else:
            block_RK = tl.load(pointers, mask=(r_R < num_rows)[:, None] & (k_K < K)[None, :], other=0.0)
    return block_RK


@triton.jit
def _repeat(x_ptr, k, BLOCK_N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """Part of one row, BLOCK_N times over, in the threads that hold those places of a block of as many rows."""
    k_NK = tl.zeros([BLOCK_N, 1], tl.int32) + (k + tl.arange(0, BLOCK_K))[None, :]
    return tl.load(x_ptr + k_NK) if WHOLE_K else tl.load(x_ptr + k_NK, mask=k_NK < K, other=0.0)


@triton.jit
def _sum_parts(sums_ptrs, mask_MN, part_size, SPLIT_K: tl.constexpr):
    """A block's partial sums, added up in the order of K.

    Other multiprocessors wrote them a moment ago: read past this one's own cache (.cg).
    """
    total_MN = tl.load(sums_ptrs, mask=mask_MN, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT_K):
        total_MN += tl.load(sums_ptrs + part * part_size, mask=mask_MN, other=0.0, cache_modifier=".cg")
    return total_MN


@triton.jit
def _finish(out_ptrs, acc_MN, up_MN, mask_MN, GATED: tl.constexpr):
    """Gate and store."""
    if GATED:
        acc_MN = acc_MN / (1.0 + tl.exp(-acc_MN)) * up_MN
    tl.store(out_ptrs, acc_MN.to(out_ptrs.dtype.element_ty), mask=mask_MN)
