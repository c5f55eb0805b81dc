"""Self-attention over the paged cache.

Shapes: T tokens, D hidden size, H query heads of this rank, K KV heads of this rank, E head dimension, R rotary pairs,
C channels of queries, keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm_kernels.paged_attention import paged_attention
from gllm_kernels.qkv import norm_rotate_cache
from torch import nn

from gllm.runtime.layers.linear import ColumnLinear, RowLinear, head_rows
from gllm.runtime.layers.norm import RmsNorm

if TYPE_CHECKING:
    from torch import Tensor

    from gllm.runtime.attention_batch import AttentionBatch, KVCache
    from gllm.runtime.layers.sharded import Placement
    from gllm.runtime.model_config import ModelConfig


class Attention(nn.Module):
    """Projections, optional norms of each head, rotary embedding, cache, attention, output projection."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        shape, self.interleaved = config.shape, config.rope.interleaved
        self.scale = shape.head_dim**-0.5
        q_size = shape.num_heads * shape.head_dim
        rows = [
            head_rows("q", shape.num_heads, shape.head_dim, place.shard),
            head_rows("k", shape.num_kv_heads, shape.head_dim, place.shard),
            head_rows("v", shape.num_kv_heads, shape.head_dim, place.shard),
        ]
        self.qkv = ColumnLinear(shape.hidden_size, rows, bias=config.qkv_bias, place=place)
        self.eps = config.rms_norm_eps
        self.q_norm = RmsNorm(shape.head_dim, eps=self.eps, place=place) if config.qk_norm else None
        self.k_norm = RmsNorm(shape.head_dim, eps=self.eps, place=place) if config.qk_norm else None
        self.out = RowLinear(
            q_size,
            shape.hidden_size,
            bias=config.o_bias,
            adds=not config.post_norms,
            place=place,
            what="the width of all query heads",
        )

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        cache: KVCache,
        *,
        norm: RmsNorm,
    ) -> tuple[Tensor | None, Tensor]:
        """Attend, after adding this micro-batch's keys and values to the cache.

        Args:
            x_TD: what is still to be added to the residual; None: nothing.
            residual_TD: hidden states.
            rotation: cosines and sines [T, R] of the tokens' angles.
            batch: the micro-batch.
            cache: this layer's cache; written.
            norm: of x + residual, comes before all of it.

        Returns:
            The output and x + residual, or None and the sum of both.
        """
        qkv_TC, residual_TD = self.qkv.after_norm(norm, x_TD, residual_TD)
        attended_THE = paged_attention(
            self._queries(qkv_TC, rotation, batch, cache),
            cache.keys,
            cache.values,
            query_starts=batch.query_starts,
            kv_lens_S=batch.kv_lens_S,
            block_tables_SB=batch.block_tables_SB,
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            max_kv_len=batch.max_kv_len,
            scale=self.scale,
            decode_plan=batch.decode_plan,
            chunk_plan=batch.chunk_plan,
            backend=batch.backend,
        )
        x_TD, residual_TD = self.out(attended_THE.flatten(1), residual_TD)
        return x_TD, residual_TD

    def _queries(
        self, qkv_TC: Tensor, rotation: tuple[Tensor, Tensor], batch: AttentionBatch, cache: KVCache
    ) -> Tensor:
        """Queries [T, H, E], ready for attention; keys and values go to the cache."""
        return norm_rotate_cache(
            qkv_TC,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            *rotation,
            cache.keys,
            cache.values,
            batch.slot_mapping_T,
            eps=self.eps,
            interleaved=self.interleaved,
        )
