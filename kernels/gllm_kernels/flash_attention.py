"""Attention by flash-attn-4 (PyPI `flash-attn-4`, imported as `flash_attn.cute`) over a paged cache.

Shapes: T tokens, S sequences, H query heads, K KV heads, E head dimension, N blocks of the cache, P tokens per block,
B blocks of a sequence.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEAD_DIMS = (64, 96, 128)  # beyond these its tiles do not fit its way of reading pages


@lru_cache
def _load() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_varlen_func  # noqa: PLC0415 - takes seconds, and is not always there

    function: Callable[..., Any] = flash_attn_varlen_func
    return function


def what_flash_lacks(*, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why flash-attn cannot serve such a cache, as the end of "flash needs ..."; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in {9, 10, 11}:
        return "an NVIDIA GPU of compute capability 9, 10 or 11"
    if dtype not in {torch.bfloat16, torch.float16}:
        return f"bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"heads of {', '.join(map(str, HEAD_DIMS))} dimensions, not {head_dim}"
    if block_size % 16:
        return f"blocks of a multiple of 16 tokens, not {block_size}"
    try:
        _load()
    except ImportError as error:
        return f"the package flash-attn-4 (pip install 'gllm[flash]'): {error}"
    return None


def flash_attention(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    max_query_len: int,
    scale: float,
) -> Tensor:
    """What each token sees of its sequence's keys up to itself, [T, H, E]; rows of no sequence are not written.

    Args:
        q_THE: queries.
        keys_NPKE: the layer's keys.
        values_NPKE: the layer's values.
        query_starts: int32 [S + 1], where each sequence's tokens begin in T; the first need not be 0.
        kv_lens_S: int32, keys of each sequence, this step's included.
        block_tables_SB: int32, blocks of each sequence in order.
        max_query_len: the most tokens of a sequence.
        scale: what scores are multiplied by.
    """
    out = _load()(
        q_THE,
        keys_NPKE,
        values_NPKE,
        cu_seqlens_q=query_starts,
        seqused_k=kv_lens_S,
        page_table=block_tables_SB,
        max_seqlen_q=max_query_len,
        softmax_scale=scale,
        causal=True,
        num_splits=1,  # it cannot split keys on Hopper
    )
    out_THE: Tensor = out[0] if isinstance(out, tuple) else out
    return out_THE
