"""A stage some or all of whose layers have experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.runtime.layers.moe import SparseMlp
from gllm.runtime.models.stage import StageModel

if TYPE_CHECKING:
    from torch import nn

    from gllm.runtime.layers.sharded import Placement


class SparseStageModel(StageModel):
    """Experts where the shape says so, a gated MLP elsewhere."""

    def make_mlp(self, layer: int, place: Placement) -> nn.Module:
        """The MLP of the layer with that global index."""
        if layer in self.config.shape.moe_layers:
            return SparseMlp(self.config, place)
        return super().make_mlp(layer, place)
