"""Causal attention of a micro-batch over keys and values kept in blocks (PagedAttention, arXiv 2309.06180).

Shapes: T tokens, S sequences, H query heads, K KV heads, E head dimension, N blocks of the cache, B blocks of a
sequence, P tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gllm_kernels.chunk_attention import ChunkPlan, chunk_attention, chunk_reference, plan_chunks
from gllm_kernels.decode_attention import DecodePlan, decode_attention, decode_reference, plan_decode
from gllm_kernels.flash_attention import flash_attention, what_flash_lacks
from gllm_kernels.jit import HAS_TRITON

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("triton", "flash", "torch")
"""torch: the references. triton: our kernels. flash: chunks by flash-attn, decodes by our kernel, which is faster."""


def choose_backend(wanted: str, *, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """The backend that a user asked for, or for "auto" triton on a GPU and torch elsewhere.

    flash-attn computes long prompts 1.4 times as fast as our kernel, and a whole benchmark of short ones more slowly:
    its launches cost the host more, and it compiles for 6 s at the start (benchmarks/NOTES.md). It is for who asks.

    Args:
        wanted: "auto" or a backend's name.
        device: where the cache is.
        dtype: of the cache.
        head_dim: of keys and values.
        block_size: tokens per block of the cache.

    Raises:
        ValueError: it cannot serve here, or there is no such backend.
    """
    if wanted not in {"auto", *BACKENDS}:
        raise ValueError(f"--attention-backend is auto, triton, flash or torch, not {wanted}")
    if wanted == "torch" or (wanted == "auto" and not (device.type == "cuda" and HAS_TRITON)):
        return "torch"
    if device.type != "cuda" or not HAS_TRITON:
        lacks = "an NVIDIA GPU" if device.type != "cuda" else "the package triton"
        raise ValueError(f"--attention-backend {wanted} needs {lacks}")
    if wanted != "flash":
        return "triton"
    flash_lacks = what_flash_lacks(device=device, dtype=dtype, head_dim=head_dim, block_size=block_size)
    if flash_lacks:
        raise ValueError(f"--attention-backend flash needs {flash_lacks}")
    return "flash"


def paged_attention(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    num_decodes: int,
    max_query_len: int,
    max_kv_len: int,
    scale: float,
    decode_plan: DecodePlan | None = None,
    chunk_plan: ChunkPlan | None = None,
    backend: str = "torch",
) -> Tensor:
    """What each token sees, [T, H, E] in q's dtype, of its sequence's keys up to itself; they are in the cache already.

    Args:
        q_THE: queries; the tokens of `num_decodes` sequences with one each come first.
        keys_NPKE: the layer's keys.
        values_NPKE: the layer's values.
        query_starts: int32 [S + 1], where each sequence's tokens begin.
        kv_lens_S: int32, keys of each sequence, its tokens of this step included.
        block_tables_SB: int32, the blocks of each sequence in order, padded with any valid block.
        num_decodes: sequences at the front with exactly one token. With both plans it is a bound: they know how many.
        max_query_len: the most tokens of a sequence in this batch.
        max_kv_len: no sequence in this batch has more keys.
        scale: what scores are multiplied by.
        decode_plan: of the decodes' lengths, shared by all layers. Without one, "triton" makes one for this call and
            "flash" has flash-attn compute decodes, too.
        chunk_plan: of the other sequences, shared by all layers. Without one, "triton" makes one for this call.
        backend: what computes, one of BACKENDS.

    Raises:
        ValueError: no such backend; shapes, types or layouts that do not fit each other.
    """
    if backend == "torch":
        tables = query_starts, kv_lens_S, block_tables_SB
        return _by_references(
            q_THE, keys_NPKE, values_NPKE, *tables, num_decodes=num_decodes, max_kv_len=max_kv_len, scale=scale
        )
    if backend not in BACKENDS:
        raise ValueError(f"there is no attention backend {backend}")
    if backend == "flash" and decode_plan is None:
        num_decodes = 0  # to flash-attn they are chunks of one token
    has_chunks = num_decodes < len(kv_lens_S)
    if backend == "flash" and has_chunks:
        out_THE = flash_attention(
            q_THE,
            keys_NPKE,
            values_NPKE,
            query_starts=query_starts[num_decodes:],
            kv_lens_S=kv_lens_S[num_decodes:],
            block_tables_SB=block_tables_SB[num_decodes:],
            max_query_len=max_query_len,
            scale=scale,
        )
    else:
        out_THE = torch.empty_like(q_THE)
    if num_decodes:
        decode_attention(
            q_THE[:num_decodes],
            keys_NPKE,
            values_NPKE,
            kv_lens_S=kv_lens_S[:num_decodes],
            block_tables_SB=block_tables_SB[:num_decodes],
            plan=decode_plan or _plan(q_THE, keys_NPKE, kv_lens_S[:num_decodes]),
            scale=scale,
            out_SHE=out_THE[:num_decodes],
        )
    if backend == "triton" and has_chunks:
        # After the decodes: where their number is a bound, these write zeros to rows that are chunks'.
        chunk_attention(
            q_THE,
            keys_NPKE,
            values_NPKE,
            query_starts=query_starts,
            kv_lens_S=kv_lens_S,
            block_tables_SB=block_tables_SB,
            plan=chunk_plan or _plan_chunks(q_THE, keys_NPKE, query_starts, kv_lens_S, num_decodes),
            scale=scale,
            out_THE=out_THE,
        )
    return out_THE


def _by_references(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    *,
    num_decodes: int,
    max_kv_len: int,
    scale: float,
) -> Tensor:
    out_THE = torch.empty_like(q_THE)
    if num_decodes:
        used_SB = block_tables_SB[:num_decodes, : -(-max_kv_len // keys_NPKE.shape[1])]
        decodes = q_THE[:num_decodes], keys_NPKE, values_NPKE, kv_lens_S[:num_decodes], used_SB
        decode_reference(out_THE[:num_decodes], *decodes, scale=scale)
    if num_decodes < len(kv_lens_S):
        tables = query_starts, kv_lens_S, block_tables_SB
        chunks = range(num_decodes, len(kv_lens_S))
        chunk_reference(out_THE, q_THE, keys_NPKE, values_NPKE, *tables, sequences=chunks, scale=scale)
    return out_THE


def _plan_chunks(
    q_THE: Tensor, keys_NPKE: Tensor, query_starts: Tensor, kv_lens_S: Tensor, num_decodes: int
) -> ChunkPlan:
    num_tokens, num_heads, head_dim = q_THE.shape
    num_kv_heads = keys_NPKE.shape[2]
    return plan_chunks(
        query_starts,
        kv_lens_S,
        torch.full((1,), num_decodes, dtype=torch.int32, device=q_THE.device),
        max_tokens=num_tokens - num_decodes,
        max_chunks=len(kv_lens_S) - num_decodes,
        group_size=num_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=keys_NPKE.dtype,
    )


def _plan(q_THE: Tensor, keys_NPKE: Tensor, kv_lens_S: Tensor) -> DecodePlan:
    _, _, num_kv_heads, head_dim = keys_NPKE.shape
    return plan_decode(
        kv_lens_S, num_heads=q_THE.shape[1], num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=keys_NPKE.dtype
    )
