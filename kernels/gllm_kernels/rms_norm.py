"""Root-mean-square norm (arXiv 1910.07467), alone or after adding to the residual.

Shapes: ... any leading dimensions, M rows (all leading dimensions together), D the normed dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gllm_kernels.early_start import await_previous, launch_options, let_next_start
from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIZE = 16384  # a row is held in the registers of one program
TILE_SIZE = 1024  # short rows share a program up to about this many elements
ELEMENTS_PER_THREAD = 16  # two accesses of 16 bytes in the 16-bit types


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension, x / sqrt(mean(x²) + eps) * weight; computed in float32, returned in x's dtype.

    The normed row is rounded to x's dtype before the weight multiplies it, as in transformers.

    Raises:
        ValueError: the weight is not of x's dtype or last dimension, or something is not contiguous.
    """
    _check(x_D, weight_D)
    return rms_norm_triton(x_D, weight_D, eps) if runs_triton(x_D) else rms_norm_reference(x_D, weight_D, eps)


def add_rms_norm(x_D: Tensor, residual_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of x + residual, and that sum, which is the next residual; both in x's dtype.

    Raises:
        ValueError: as `rms_norm`, or the residual is not of x's dtype and shape.
    """
    _check(x_D, weight_D)
    if residual_D.shape != x_D.shape or residual_D.dtype != x_D.dtype or not residual_D.is_contiguous():
        raise ValueError(f"the residual must be a contiguous {x_D.dtype} {tuple(x_D.shape)}, as x is")
    if runs_triton(x_D):
        return add_rms_norm_triton(x_D, residual_D, weight_D, eps)
    return add_rms_norm_reference(x_D, residual_D, weight_D, eps)


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Plain torch."""
    wide_D = x_D.float()
    normed_D = wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_D.to(x_D.dtype)


def add_rms_norm_reference(x_D: Tensor, residual_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain torch."""
    sum_D = x_D + residual_D
    return rms_norm_reference(sum_D, weight_D, eps), sum_D


def rms_norm_triton(
    x_D: Tensor, weight_D: Tensor, eps: float, *, elements_per_thread: int = ELEMENTS_PER_THREAD
) -> Tensor:
    """The kernel, without a residual."""
    out_D = torch.empty_like(x_D)
    _launch(x_D, None, weight_D, out_D, None, eps, elements_per_thread)
    return out_D


def add_rms_norm_triton(
    x_D: Tensor,
    residual_D: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    elements_per_thread: int = ELEMENTS_PER_THREAD,
) -> tuple[Tensor, Tensor]:
    """The kernel, with a residual."""
    out_D, sum_D = torch.empty_like(x_D), torch.empty_like(x_D)
    _launch(x_D, residual_D, weight_D, out_D, sum_D, eps, elements_per_thread)
    return out_D, sum_D


def _check(x_D: Tensor, weight_D: Tensor) -> None:
    size = x_D.shape[-1]
    if weight_D.shape != (size,) or weight_D.dtype != x_D.dtype:
        raise ValueError(
            f"the norm's weight must be {x_D.dtype} [{size}] as x's last dimension, "
            f"but is {weight_D.dtype} {list(weight_D.shape)}"
        )
    if not (x_D.is_contiguous() and weight_D.is_contiguous()):
        raise ValueError("the norm needs contiguous tensors")
    if size > MAX_SIZE:
        raise ValueError(f"the norm takes rows of up to {MAX_SIZE} elements, not {size}")


def _launch(
    x_D: Tensor,
    residual_D: Tensor | None,
    weight_D: Tensor,
    out_D: Tensor,
    sum_D: Tensor | None,
    eps: float,
    elements_per_thread: int,
) -> None:
    size = x_D.shape[-1]
    num_rows, block = x_D.numel() // size, next_power_of_2(size)
    # Heads are short: several to a program. Hidden states are long, and a step may have one alone: a program each.
    rows = TILE_SIZE // block if block <= 256 else 1
    _rms_norm_kernel[(-(-num_rows // rows),)](
        x_D,
        residual_D,
        weight_D,
        out_D,
        sum_D,
        num_rows,
        eps,
        SIZE=size,
        BLOCK=block,
        ROWS=rows,
        **launch_options(),
        num_warps=min(max(rows * block // (32 * elements_per_thread), 1), 16),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_MD,
    residual_MD,
    weight_D,
    out_MD,
    sum_MD,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program norms ROWS whole rows; without a residual there is no sum either."""
    let_next_start(EARLY)
    await_previous(EARLY)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    held = (rows < num_rows)[:, None] & (columns < SIZE)
    places = rows[:, None] * SIZE + columns
    x = tl.load(x_MD + places, mask=held, other=0.0)
    weight = tl.load(weight_D + columns, mask=columns < SIZE, other=0.0)
    if residual_MD is not None:
        x = (x.to(tl.float32) + tl.load(residual_MD + places, mask=held, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_MD + places, x, mask=held)
    wide = x.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)
    normed = (wide * scale[:, None]).to(x.dtype)
    tl.store(out_MD + places, (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype), mask=held)
