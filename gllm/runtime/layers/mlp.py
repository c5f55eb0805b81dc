"""Gated MLP. Shapes: T tokens, D hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm_kernels.silu_and_mul import silu_and_mul
from torch import nn

from gllm.runtime.layers.linear import ColumnLinear, RowLinear, even_rows

if TYPE_CHECKING:
    from torch import Tensor

    from gllm.runtime.layers.sharded import Placement


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), its width cut over the ranks."""

    def __init__(
        self, hidden_size: int, width: int, *, place: Placement, bias: bool = False, what: str = "intermediate_size"
    ) -> None:
        super().__init__()
        rows = [even_rows(name, width, place.shard, what=what) for name in ("gate", "up")]
        self.gate_up = ColumnLinear(hidden_size, rows, bias=bias, place=place)
        self.down = RowLinear(width, hidden_size, bias=bias, place=place, what=what)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The whole output, equal on all ranks."""
        out_TD: Tensor = self.down(silu_and_mul(self.gate_up(x_TD)))
        return out_TD

    def partial(self, x_TD: Tensor) -> Tensor:
        """This rank's addend of the output (without down's bias)."""
        return self.down.partial(silu_and_mul(self.gate_up(x_TD)))
