"""Root-mean-square norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm_kernels.rms_norm import add_rms_norm, rms_norm

from gllm.runtime.layers.sharded import Placement, Rows, Sharded, stacked

if TYPE_CHECKING:
    from torch import Tensor


class RmsNorm(Sharded):
    """Norm over the last dimension, with a weight that every rank holds whole."""

    weight: Tensor

    def __init__(self, size: int, *, eps: float, place: Placement) -> None:
        super().__init__(place)
        self.eps = eps
        self.add("weight", *stacked([Rows("", size, slice(0, size))]))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; without x, of the residual alone."""
        if x is None:
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps)
