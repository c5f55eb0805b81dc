"""Causal attention of a micro-batch over keys and values kept in blocks (PagedAttention, arXiv 2309.06180).

Shapes: T tokens, S sequences, Q tokens of one chunk, L keys of one sequence (padded to the longest), H query heads,
K KV heads, G = H / K query heads per KV head, E head dimension, N blocks of the cache, B blocks of a sequence,
P tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def paged_attention(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    num_decodes: int,
    max_query_len: int,  # noqa: ARG001 - a GPU kernel's grid needs it; the reference does not
    max_kv_len: int,
    scale: float,
) -> Tensor:
    """What each token sees, [T, H, E] in q's dtype, of its sequence's keys up to itself; they are in the cache already.

    Args:
        q_THE: queries; the tokens of `num_decodes` sequences with one each come first.
        keys_NPKE: the layer's keys.
        values_NPKE: the layer's values.
        query_starts: int32 [S + 1], where each sequence's tokens begin.
        kv_lens_S: int32, keys of each sequence, its tokens of this step included.
        block_tables_SB: int32, the blocks of each sequence in order, padded with any valid block.
        num_decodes: sequences at the front with exactly one token.
        max_query_len: the most tokens of a sequence in this batch.
        max_kv_len: the most keys of a sequence in this batch.
        scale: what scores are multiplied by.
    """
    out_THE = torch.empty_like(q_THE)
    if num_decodes:
        out_THE[:num_decodes] = decode_reference(
            q_THE[:num_decodes],
            keys_NPKE,
            values_NPKE,
            kv_lens_S=kv_lens_S[:num_decodes],
            block_tables_SB=block_tables_SB[:num_decodes],
            max_kv_len=max_kv_len,
            scale=scale,
        )
    if num_decodes < len(kv_lens_S):
        chunks_reference(
            out_THE,
            q_THE,
            keys_NPKE,
            values_NPKE,
            query_starts=query_starts.tolist(),
            kv_lens=kv_lens_S.tolist(),
            block_tables_SB=block_tables_SB,
            first=num_decodes,
            scale=scale,
        )
    return out_THE


def decode_reference(
    q_SHE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    max_kv_len: int,
    scale: float,
) -> Tensor:
    """Plain torch: gather every sequence's keys, padded to the longest, and mask the padding."""
    num_kv_heads = keys_NPKE.shape[2]
    blocks_SB = block_tables_SB[:, : -(-max_kv_len // keys_NPKE.shape[1])]
    k_SLKE = keys_NPKE[blocks_SB].flatten(1, 2).float()
    v_SLKE = values_NPKE[blocks_SB].flatten(1, 2).float()
    q_SKGE = q_SHE.float().reshape(len(q_SHE), num_kv_heads, -1, q_SHE.shape[2]) * scale
    scores_SKGL = q_SKGE @ k_SLKE.permute(0, 2, 3, 1)
    places_L = torch.arange(k_SLKE.shape[1], device=q_SHE.device)
    beyond_SL = places_L >= kv_lens_S[:, None]
    # The least number rather than minus infinity: an empty sequence (padding of a batch) then gives no NaN.
    weights_SKGL = scores_SKGL.masked_fill_(beyond_SL[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
    out_SKGE: Tensor = weights_SKGL @ v_SLKE.permute(0, 2, 1, 3)
    return out_SKGE.flatten(1, 2).to(q_SHE.dtype)


def chunks_reference(
    out_THE: Tensor,
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    query_starts: Sequence[int],
    kv_lens: Sequence[int],
    block_tables_SB: Tensor,
    first: int,
    scale: float,
) -> None:
    """Plain torch: one sequence after another from the one numbered `first` on; writes into `out_THE`."""
    for sequence in range(first, len(kv_lens)):
        start, end, kv_len = query_starts[sequence], query_starts[sequence + 1], kv_lens[sequence]
        blocks_B = block_tables_SB[sequence, : -(-kv_len // keys_NPKE.shape[1])]
        out_THE[start:end] = _attend(
            q_THE[start:end],
            keys_NPKE[blocks_B].flatten(0, 1)[:kv_len],
            values_NPKE[blocks_B].flatten(0, 1)[:kv_len],
            scale,
        )


def _attend(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, scale: float) -> Tensor:
    """One sequence's last Q tokens over its L keys."""
    num_queries, num_keys, group = len(q_QHE), len(k_LKE), q_QHE.shape[1] // k_LKE.shape[1]
    q_HQE = q_QHE.float().transpose(0, 1)
    k_HLE = k_LKE.float().transpose(0, 1).repeat_interleave(group, 0)
    v_HLE = v_LKE.float().transpose(0, 1).repeat_interleave(group, 0)
    sees_QL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_QHE.device).tril(num_keys - num_queries)
    out_HQE = functional.scaled_dot_product_attention(
        q_HQE[None], k_HLE[None], v_HLE[None], attn_mask=sees_QL, scale=scale
    )[0]
    return out_HQE.transpose(0, 1).to(q_QHE.dtype)
