"""What attention must know of a micro-batch, and where a layer's keys and values are kept.

Shapes: T tokens of a micro-batch, S sequences, B blocks of a sequence, P tokens per block, K KV heads of this rank,
E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from gllm_kernels.chunk_plan import ChunkPlan
    from gllm_kernels.decode_plan import DecodePlan
    from torch import Tensor

    from gllm.runtime.model_config import ModelConfig
    from gllm.runtime.shard import Shard


class KVCache(NamedTuple):
    """One layer's cache: keys and values, each [number of blocks, P, K, E]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """One micro-batch flattened to T tokens: sequences that decode first, then those with a chunk of their prompt."""

    positions_T: Tensor  # int64, of each token in its sequence
    slot_mapping_T: Tensor  # int64: block * P + offset where each token's key and value go
    query_starts: Tensor  # int32 [S + 1]: sequence s has tokens query_starts[s] to query_starts[s + 1]
    kv_lens_S: Tensor  # int32, keys of each sequence, this step's included
    block_tables_SB: Tensor  # int32, padded with any valid block
    num_decodes: int  # the first this many sequences have exactly one token each; with both plans a bound
    max_query_len: int
    max_kv_len: int
    decode_plan: DecodePlan | None = None  # of the decodes' lengths, for kernels that share their keys out
    chunk_plan: ChunkPlan | None = None  # of the chunks, for kernels that share their rows out
    backend: str = "torch"  # what computes attention


def allocate_caches(
    config: ModelConfig, shard: Shard, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """Caches of the layers of one rank.

    Zeroed: what is masked still enters a product with zero, and zero times an uninitialised NaN would be NaN.
    """
    size = (num_blocks, block_size, config.shape.kv_heads_on(shard.tp_size), config.shape.head_dim)

    def empty() -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return [KVCache(empty(), empty()) for _ in shard.layers]
