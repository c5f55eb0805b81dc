"""A linear layer with what stands before and after it, and kernels that do it at once for few rows.

A step of few sequences takes as long as its weights take to read, and as its launches cost. One row needs no tensor
cores: each program multiplies some rows of the weight with it elementwise, and sums once, at the end; a norm before
the product is a sum of squares on the way and a factor at the end. Up to 32 rows are one or two tiles of the tensor
cores, the weight the larger side of them; their norm is a kernel of its own, since what goes from memory to the tensor
cores by asynchronous copies passes no registers where it could be scaled. More rows are cuBLAS's.

Shapes: M rows, N rows of the weight, K the size summed over, O columns of the output (N, or N / 2 of a gated one).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from gllm_kernels.early_start import await_previous, launch_options, let_next_start
from gllm_kernels.jit import runs_triton, shared_memory, tl, triton
from gllm_kernels.rms_norm import rms_norm
from gllm_kernels.silu_and_mul import silu_and_mul

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROWS, TILE_ROWS = 32, 16  # the tensor cores take x by tiles of so many rows
MIN_TILED = 1024  # rows of the weight: of fewer, tiles occupy few multiprocessors, and cuBLAS cuts K instead
_DTYPES = frozenset((torch.bfloat16, torch.float16))


class Tuning(NamedTuple):
    """How a kernel runs; never what it computes."""

    block_n: int  # rows of the weight that a program has, a power of two; at least 16 with several rows of x
    block_k: int  # read at a time
    num_warps: int
    num_stages: int  # of the pipeline that loads tiles; one row has none


def linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    gain_K: Tensor | None = None,
    eps: float = 0.0,
    residual_MO: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The product x @ weight.T, a norm of x before it; bias, gate and residual after it; [M, O] in x's dtype.

    Args:
        x_MK: any number of rows. What one kernel does, it does in float32 and rounds once.
        weight_NK: in x's dtype; if gated, all rows of the gate, then all rows of what it multiplies.
        bias_N: likewise.
        gain_K: weight of the root-mean-square norm; None: x is not normed.
        eps: of the norm.
        residual_MO: added to the output.
        gated: the output is silu(first half) * second half.

    Raises:
        ValueError: shapes or dtypes do not fit one another, or something is not contiguous.
    """
    _check(x_MK, weight_NK, bias_N, gain_K, residual_MO, gated=gated)
    run = linear_triton if takes(x_MK, weight_NK) else linear_reference
    return run(x_MK, weight_NK, bias_N, gain_K=gain_K, eps=eps, residual_MO=residual_MO, gated=gated)


def takes(x_MK: Tensor, weight_NK: Tensor) -> bool:
    """Whether `linear` does all that follows the product at once with it."""
    return (
        runs_triton(x_MK)
        and x_MK.dtype in _DTYPES
        and 0 < len(x_MK) <= MAX_ROWS
        and (len(x_MK) == 1 or len(weight_NK) >= MIN_TILED)
        and weight_NK.shape[1] % 16 == 0  # whole vectors, in every row
    )


@lru_cache
def default_tuning(num_rows: int, num_weights: int, size: int) -> Tuning:
    """What suits an H200, by M, N and K."""
    if num_rows > TILE_ROWS:
        return Tuning(block_n=64, block_k=128, num_warps=4, num_stages=6 if num_weights <= 1 << 13 else 3)
    if num_rows > 1:
        if num_weights <= 1 << 13:  # no more programs than multiprocessors: each loads far ahead
            return Tuning(block_n=64, block_k=256, num_warps=4, num_stages=4)
        return Tuning(block_n=64, block_k=128, num_warps=4, num_stages=3)  # so that several share one
    if num_weights > 1 << 16:
        return Tuning(block_n=16, block_k=256, num_warps=4, num_stages=1)
    if size <= 1024:
        return Tuning(block_n=2, block_k=512, num_warps=2, num_stages=1)
    return Tuning(block_n=2, block_k=1024, num_warps=4, num_stages=1)


def fitted(tuning: Tuning, tile_rows: int, num_bytes: int) -> Tuning:
    """With no more stages than so much shared memory holds: of each a tile of the weight and one of x, 16-bit."""
    stage_bytes = 2 * (tuning.block_n + tile_rows) * tuning.block_k
    return tuning._replace(num_stages=max(1, min(tuning.num_stages, num_bytes // stage_bytes)))


def _check(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    gain_K: Tensor | None,
    residual_MO: Tensor | None,
    *,
    gated: bool,
) -> None:
    if x_MK.dim() != 2 or weight_NK.dim() != 2 or x_MK.shape[1] != weight_NK.shape[1]:
        raise ValueError(f"x {list(x_MK.shape)} and the weight {list(weight_NK.shape)} must be [M, K] and [N, K]")
    num_rows, (num_weights, size) = len(x_MK), weight_NK.shape
    if gated and num_weights % 2:
        raise ValueError(f"a gate needs an even number of rows of the weight, not {num_weights}")
    num_outs = num_weights // 2 if gated else num_weights
    for what, tensor, shape in (
        ("input", x_MK, (num_rows, size)),
        ("weight", weight_NK, (num_weights, size)),
        ("bias", bias_N, (num_weights,)),
        ("norm's weight", gain_K, (size,)),
        ("residual", residual_MO, (num_rows, num_outs)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x_MK.dtype):
            raise ValueError(
                f"the {what} must be {x_MK.dtype} {list(shape)}, but is {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"the {what} must be contiguous, but has strides {tensor.stride()}")


def linear_reference(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    gain_K: Tensor | None = None,
    eps: float = 0.0,
    residual_MO: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """One after the other: plain torch on a CPU, on a GPU cuBLAS and a kernel for each of the rest."""
    if gain_K is not None:
        x_MK = rms_norm(x_MK, gain_K, eps)
    out = functional.linear(x_MK, weight_NK, bias_N)
    if gated:
        out = silu_and_mul(out)
    return out if residual_MO is None else out + residual_MO


def linear_triton(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    gain_K: Tensor | None = None,
    eps: float = 0.0,
    residual_MO: Tensor | None = None,
    gated: bool = False,
    tuning: Tuning | None = None,
) -> Tensor:
    """The kernels, of up to 32 rows (see `takes`); `tuning` in place of what suits these shapes."""
    (num_rows, size), num_weights = x_MK.shape, len(weight_NK)
    tile_rows = TILE_ROWS if num_rows <= TILE_ROWS else MAX_ROWS
    tuning = tuning or default_tuning(num_rows, num_weights, size)
    if num_rows > 1:
        tuning = fitted(tuning, tile_rows, shared_memory(x_MK.device))
        if gain_K is not None:
            x_MK, gain_K = rms_norm(x_MK, gain_K, eps), None
    num_outs = num_weights // 2 if gated else num_weights
    block_n = max(tuning.block_n, 2) if gated else tuning.block_n
    num_programs = -(-num_outs // (block_n // 2 if gated else block_n))
    out_MO = x_MK.new_empty(num_rows, num_outs)
    launch = partial(
        (_one_row_kernel if num_rows == 1 else _few_rows_kernel)[(num_programs,)],
        bias_N=bias_N,
        residual_MO=residual_MO,
        out_MO=out_MO,
        num_outs=num_outs,
        size=size,
        GATED=gated,
        WHOLE=size % tuning.block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=tuning.block_k,
        **launch_options(),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    if num_rows == 1:
        launch(x_MK, weight_NK, gain_K=gain_K, eps=eps)
    else:
        launch(x_MK, weight_NK, num_rows=num_rows, BLOCK_M=tile_rows)
    return out_MO


@triton.jit(do_not_specialize=["num_outs"])
def _one_row_kernel(
    x_MK,
    weight_NK,
    gain_K,
    eps,
    bias_N,
    residual_MO,
    out_MO,
    num_outs,
    size,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Elementwise products, summed over K by each element of a tile, and over the tile at the end."""
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_NK + _rows(num_outs, GATED, BLOCK_N)[:, None].to(tl.int64) * size + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    await_previous(EARLY)
    for at in range(0, size, BLOCK_K):
        held = (at + k < size) | WHOLE
        weight = tl.load(weight_at + at, mask=held[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_MK + at + k, mask=held, other=0.0).to(tl.float32)
        if gain_K is not None:
            squares += x * x
            x *= tl.load(gain_K + at + k, mask=held, other=0.0).to(tl.float32)
        acc += weight * x[None, :]
    let_next_start(EARLY)
    out = tl.sum(acc, axis=1, keep_dims=True)
    if gain_K is not None:
        out *= tl.math.rsqrt(tl.sum(squares) / size + eps)
    _finish(out, 1, bias_N, residual_MO, out_MO, num_outs, GATED, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows", "num_outs"])
def _few_rows_kernel(
    x_MK,
    weight_NK,
    num_rows,
    bias_N,
    residual_MO,
    out_MO,
    num_outs,
    size,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A product of tiles, the weight on the left: only there may a side be as short as M."""
    k, m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    weight_at = weight_NK + _rows(num_outs, GATED, BLOCK_N)[:, None].to(tl.int64) * size + k[None, :]
    x_at = x_MK + m[None, :] * size + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    await_previous(EARLY)
    for at in range(0, size, BLOCK_K):
        held = (at + k < size) | WHOLE
        weight = tl.load(weight_at + at, mask=held[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + at, mask=(m < num_rows)[None, :] & held[:, None], other=0.0)
        acc = tl.dot(weight, x, acc)
    let_next_start(EARLY)
    _finish(acc, num_rows, bias_N, residual_MO, out_MO, num_outs, GATED, BLOCK_N)


@triton.jit
def _columns(GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns of the output each of a tile's rows belongs to: of a gate, two neighbours to the same."""
    per_column: tl.constexpr = 2 if GATED else 1
    return tl.program_id(0) * (BLOCK_N // per_column) + tl.arange(0, BLOCK_N) // per_column


@triton.jit
def _rows(num_outs, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the weight that a tile has; those beyond its end are the last one again, and not stored."""
    rows = tl.minimum(_columns(GATED, BLOCK_N), num_outs - 1)
    if GATED:
        rows += tl.arange(0, BLOCK_N) % 2 * num_outs
    return rows


@triton.jit
def _finish(out, num_rows, bias_N, residual_MO, out_MO, num_outs, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bias, gate and residual of a tile [rows of the weight, rows of x], and its way to memory."""
    columns = _columns(GATED, BLOCK_N)
    if bias_N is not None:
        out += tl.load(bias_N + _rows(num_outs, GATED, BLOCK_N)).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(out, (BLOCK_N // 2, 2, out.shape[1])), (0, 2, 1))
        gate, up = tl.split(pairs)
        out = gate / (1.0 + tl.exp(-gate)) * up
        columns = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    m = tl.arange(0, out.shape[1])
    places = m[None, :] * num_outs + columns[:, None]
    held = (m < num_rows)[None, :] & (columns < num_outs)[:, None]
    if residual_MO is not None:
        out += tl.load(residual_MO + places, mask=held, other=0.0).to(tl.float32)
    tl.store(out_MO + places, out.to(out_MO.dtype.element_ty), mask=held)
