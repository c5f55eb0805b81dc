"""The gate of a gated MLP (SwiGLU, arXiv 2002.05202).

Shapes: ... any leading dimensions, M rows (all leading dimensions together), I the MLP's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from gllm_kernels.jit import runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

FEW_ELEMENTS = 1 << 20  # of output; up to here small blocks, which spread over more multiprocessors
SMALL_BLOCK, LARGE_BLOCK = 512, 2048
ELEMENTS_PER_THREAD = 16


def silu_and_mul(gate_up_2I: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds all of gate, then all of up.

    silu is rounded to the input's dtype before it multiplies, as in transformers.

    Raises:
        ValueError: the last dimension is odd, or the tensor not contiguous.
    """
    if gate_up_2I.shape[-1] % 2 or not gate_up_2I.is_contiguous():
        raise ValueError(
            f"gate and up must lie side by side in a contiguous tensor with an even last dimension, "
            f"not {tuple(gate_up_2I.shape)} with strides {gate_up_2I.stride()}"
        )
    return silu_and_mul_triton(gate_up_2I) if runs_triton(gate_up_2I) else silu_and_mul_reference(gate_up_2I)


def silu_and_mul_reference(gate_up_2I: Tensor) -> Tensor:
    """Plain torch."""
    gate_I, up_I = gate_up_2I.chunk(2, dim=-1)
    return functional.silu(gate_I) * up_I


def silu_and_mul_triton(
    gate_up_2I: Tensor, *, block: int | None = None, elements_per_thread: int = ELEMENTS_PER_THREAD
) -> Tensor:
    """The kernel; `block` is how many elements a program writes (default: by the size of the output)."""
    width = gate_up_2I.shape[-1] // 2
    out_I = gate_up_2I.new_empty((*gate_up_2I.shape[:-1], width))
    num_elements = out_I.numel()
    if block is None:  # a power of two that divides the width leaves no lane idle
        most = SMALL_BLOCK if num_elements <= FEW_ELEMENTS else LARGE_BLOCK
        block = min(most, max(width & -width, SMALL_BLOCK))
    num_blocks = -(-width // block)
    _silu_and_mul_kernel[(num_elements // width * num_blocks,)](
        gate_up_2I,
        out_I,
        WIDTH=width,
        BLOCK=block,
        num_warps=max(block // (32 * elements_per_thread), 1),
    )
    return out_I


@triton.jit
def _silu_and_mul_kernel(gate_up_M2I, out_MI, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program writes BLOCK columns of a row; neighbouring programs the neighbouring columns."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    held = columns < WIDTH
    gate_at = gate_up_M2I + row * (2 * WIDTH) + columns
    gate = tl.load(gate_at, mask=held, other=0.0)
    up = tl.load(gate_at + WIDTH, mask=held, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_MI + row * WIDTH + columns, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=held)
