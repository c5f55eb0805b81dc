"""One stage of a model: the decoder layers that one rank holds, the embedding if it is first, the head if it is last.

Shapes: T tokens of a micro-batch, R rows of it that need logits, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from gllm.runtime.layers.attention import Attention
from gllm.runtime.layers.embedding import VocabEmbedding
from gllm.runtime.layers.mlp import GatedMlp
from gllm.runtime.layers.norm import RmsNorm
from gllm.runtime.layers.rotary import RotaryAngles
from gllm.runtime.layers.sharded import Placement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gllm.runtime.attention_batch import AttentionBatch, KVCache
    from gllm.runtime.model_config import ModelConfig
    from gllm.runtime.shard import Shard


class DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP, each added to the residual; with `post_norms`, normed once more before."""

    def __init__(self, config: ModelConfig, place: Placement, mlp: nn.Module) -> None:
        super().__init__()

        def norm() -> RmsNorm:
            return RmsNorm(config.shape.hidden_size, eps=config.rms_norm_eps, place=place)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention, self.mlp = Attention(config, place), mlp
        self.after_attention = norm() if config.post_norms else nn.Identity()
        self.after_mlp = norm() if config.post_norms else nn.Identity()

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        cache: KVCache,
    ) -> tuple[Tensor | None, Tensor]:
        """Take and give what is still to be added to the residual apart from it: the next norm adds on its way."""
        x_TD, residual_TD = self.attention(x_TD, residual_TD, rotation, batch, cache, norm=self.attention_norm)
        x_TD, residual_TD = self.mlp(self.after_attention(x_TD), residual_TD, batch, norm=self.mlp_norm)
        return self.after_mlp(x_TD), residual_TD


class StageModel(nn.Module):
    """What one rank holds of a model. A family is a subclass: its checkpoint's names, and its kind of MLP."""

    names: ClassVar[Mapping[str, str]]
    """Our name of each tensor and its name in a checkpoint, both less ".weight" or ".bias"; a star is a number.

    Names of the same tensor for several parts of one module mean that they lie one after the other in it.
    """

    ignored: ClassVar[tuple[str, ...]] = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    """Tensors of a checkpoint that nothing needs."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        self.dtype = getattr(torch, config.dtype) if dtype is None else dtype
        self.device = torch.device(device)
        place = Placement(shard=shard, dtype=self.dtype, device=self.device)
        shape = config.shape
        self.embedding: VocabEmbedding | None = None
        if shard.is_first:
            self.embedding = VocabEmbedding(shape.vocab_size, shape.hidden_size, place=place)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, place, self.make_mlp(layer, place)) for layer in shard.layers}
        )
        self.angles = RotaryAngles(config.rope, device=self.device)
        self.norm: RmsNorm | None = None
        self.head: VocabEmbedding | None = None
        if shard.is_last:
            self.norm = RmsNorm(shape.hidden_size, eps=config.rms_norm_eps, place=place)
            self.head = self.embedding if config.tie_word_embeddings else None
            self.head = self.head or VocabEmbedding(shape.vocab_size, shape.hidden_size, place=place)

    def make_mlp(self, layer: int, place: Placement) -> nn.Module:
        """The MLP of the layer with that global index; a family with experts overrides it."""
        del layer
        shape = self.config.shape
        return GatedMlp(
            shape.hidden_size,
            shape.intermediate_size,
            bias=self.config.mlp_bias,
            adds=not self.config.post_norms,
            place=place,
        )

    def checkpoint_name(self, name: str) -> str:
        """Where a checkpoint keeps the tensor that we call `name` (both less ".weight" or ".bias")."""
        if name == "head" and self.config.tie_word_embeddings:
            name = "embedding"
        words = name.split(".")
        numbers = [word for word in words if word.isdigit()]
        generic = ".".join("*" if word.isdigit() else word for word in words)
        return self.names[generic].replace("*", "{}").format(*numbers)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings of tokens [T, D]; on the first stage."""
        assert self.embedding is not None, "only the first stage embeds"
        x_TD: Tensor = self.embedding(token_ids_T)
        return x_TD

    def forward(self, x_TD: Tensor, batch: AttentionBatch, caches: Sequence[KVCache]) -> Tensor:
        """Run this stage's layers.

        Args:
            x_TD: hidden states, from `embed` or the stage before.
            batch: the micro-batch.
            caches: one per layer of this stage; written.

        Returns:
            Hidden states [T, D] for the next stage or for `logits`.
        """
        rotation = self.angles(batch.positions_T)
        delta_TD: Tensor | None = None
        for layer, cache in zip(self.layers.values(), caches, strict=True):
            delta_TD, x_TD = layer(delta_TD, x_TD, rotation, batch, cache)
        return x_TD if delta_TD is None else x_TD + delta_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """Scores of all tokens [R, V] in the model's type, equal on the stage's ranks; on the last stage."""
        assert self.norm is not None, "only the last stage has a head"
        assert self.head is not None, "only the last stage has a head"
        return self.head.logits(self.norm, x_RD)
