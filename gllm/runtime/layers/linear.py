"""Linear layers: whole, cut by rows of the output, or cut by columns of the input (Megatron-LM, arXiv 1909.08053).

Shapes: T tokens, I input size, O output size on this rank.

Hidden states travel as x, what is still to be added to the residual (None: nothing), and the residual. A norm adds on
its way, and so does a RowLinear of few tokens: whoever comes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm_kernels.few_rows import linear, takes

from gllm.runtime.layers.sharded import Part, Placement, Rows, Sharded, stacked
from gllm.runtime.shard import slice_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gllm.runtime.layers.norm import RmsNorm
    from gllm.runtime.shard import Shard


class ColumnLinear(Sharded):
    """One or several projections of the same input, stacked into one product; each rank has some rows of each."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_size: int, rows: Sequence[Rows], *, bias: bool, place: Placement) -> None:
        super().__init__(place)
        self.sizes = [each.num_held for each in rows]
        self.add("weight", *stacked(rows, (in_size,)))
        if bias:
            self.add("bias", *stacked(rows))
        else:
            self.bias = None

    def forward(self, x_TI: Tensor, *, gated: bool = False) -> Tensor:
        """All projections side by side: [T, sum of `sizes`]; gated, silu of the first times the second: [T, O]."""
        return linear(x_TI, self.weight, self.bias, gated=gated)

    def after_norm(
        self, norm: RmsNorm, x_TI: Tensor | None, residual_TI: Tensor, *, gated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The same of the norm of x + residual, and that sum; without x, of the residual alone."""
        if x_TI is not None:
            normed_TI, residual_TI = norm.after_adding(x_TI, residual_TI)
            return self(normed_TI, gated=gated), residual_TI
        out_TO = linear(residual_TI, self.weight, self.bias, gain_K=norm.weight, eps=norm.eps, gated=gated)
        return out_TO, residual_TI


def replicated(in_size: int, out_size: int, *, place: Placement) -> ColumnLinear:
    """A linear layer that every rank holds whole, as a router is."""
    return ColumnLinear(in_size, [Rows("", out_size, slice(0, out_size))], bias=False, place=place)


class RowLinear(Sharded):
    """The way back: each rank holds the columns for its part of the input, and the sum over ranks is the output.

    With `adds`, nothing stands between the output and the residual: it may be added on the way.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_size: int, out_size: int, *, bias: bool, adds: bool, place: Placement, what: str) -> None:
        super().__init__(place)
        self._adds = adds and place.shard.tp_size == 1
        held = slice_of(in_size, place.shard.tp_size, place.shard.tp_rank, what=what)
        part = Part("", (out_size, in_size), (slice(0, out_size), held), ())
        self.add("weight", (out_size, held.stop - held.start), [part])
        if bias:
            self.add("bias", *stacked([Rows("", out_size, slice(0, out_size))]))
        else:
            self.bias = None

    def forward(self, x_TI: Tensor, residual_TO: Tensor) -> tuple[Tensor | None, Tensor]:
        """The whole output and the residual, or None and their sum if that costs nothing; equal on all ranks."""
        if self._adds and takes(x_TI, self.weight):
            return None, linear(x_TI, self.weight, self.bias, residual_MO=residual_TO)
        out_TO = self.shard.group.all_reduce(self.partial(x_TI))
        return out_TO if self.bias is None else out_TO + self.bias, residual_TO

    def partial(self, x_TI: Tensor) -> Tensor:
        """This rank's addend of the output, without bias; the caller sums over ranks."""
        return linear(x_TI, self.weight)


def even_rows(name: str, full: int, shard: Shard, *, what: str) -> Rows:
    """An equal share of the rows for each rank."""
    return Rows(name, full, slice_of(full, shard.tp_size, shard.tp_rank, what=what))


def head_rows(name: str, num_heads: int, head_dim: int, shard: Shard) -> Rows:
    """A share of the heads; with fewer heads than ranks, neighbouring ranks hold the same one."""
    if shard.tp_size <= num_heads:
        heads = slice_of(num_heads, shard.tp_size, shard.tp_rank, what=f"the number of {name} heads")
    else:
        slice_of(shard.tp_size, num_heads, 0, what=f"with {num_heads} {name} heads, --tp")
        head = shard.tp_rank // (shard.tp_size // num_heads)
        heads = slice(head, head + 1)
    return Rows(name, num_heads * head_dim, slice(heads.start * head_dim, heads.stop * head_dim))
