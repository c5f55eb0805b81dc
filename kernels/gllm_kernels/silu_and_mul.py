"""The gate of a gated MLP (SwiGLU, arXiv 2002.05202). Shapes: ... any leading dimensions, I the MLP's width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def silu_and_mul(gate_up_2I: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds all of gate, then all of up."""
    return silu_and_mul_reference(gate_up_2I)


def silu_and_mul_reference(gate_up_2I: Tensor) -> Tensor:
    """Plain torch."""
    gate_I, up_I = gate_up_2I.chunk(2, dim=-1)
    return functional.silu(gate_I) * up_I
