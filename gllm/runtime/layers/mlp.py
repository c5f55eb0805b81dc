"""Gated MLP. Shapes: T tokens, D hidden size, I width on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gllm.runtime.layers.linear import ColumnLinear, RowLinear, even_rows

if TYPE_CHECKING:
    from torch import Tensor

    from gllm.runtime.attention_batch import AttentionBatch
    from gllm.runtime.layers.norm import RmsNorm
    from gllm.runtime.layers.sharded import Placement


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), its width cut over the ranks."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        place: Placement,
        bias: bool = False,
        adds: bool = True,
        what: str = "intermediate_size",
    ) -> None:
        super().__init__()
        rows = [even_rows(name, width, place.shard, what=what) for name in ("gate", "up")]
        self.gate_up = ColumnLinear(hidden_size, rows, bias=bias, place=place)
        self.down = RowLinear(width, hidden_size, bias=bias, adds=adds, place=place, what=what)

    def forward(
        self, x_TD: Tensor | None, residual_TD: Tensor, batch: AttentionBatch, *, norm: RmsNorm
    ) -> tuple[Tensor | None, Tensor]:
        """The whole output for the norm of x + residual, and that sum, or None and the sum of both."""
        del batch  # padding costs nothing of its own here
        hidden_TI, residual_TD = self.gate_up.after_norm(norm, x_TD, residual_TD, gated=True)
        x_TD, residual_TD = self.down(hidden_TI, residual_TD)
        return x_TD, residual_TD

    def partial(self, x_TD: Tensor) -> Tensor:
        """This rank's addend of the output for x itself (without down's bias)."""
        return self.down.partial(self.gate_up(x_TD, gated=True))
