"""Causal attention of chunks of prompts over a paged cache that holds what came before them and the chunks themselves.

FlashAttention-2 (arXiv 2307.08691) with the query heads that share a KV head packed into the rows of one product:
a row is one query of one head. Each program has a block of rows (see `chunk_plan`); the keys that all its rows see are
read without masks.

Shapes: T tokens, S sequences, Q tokens of one chunk, L keys of one sequence, H query heads, K KV heads, G = H / K query
heads per KV head, E head dimension, N blocks of the cache, P tokens per block, B blocks of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gllm_kernels.chunk_plan import ChunkPlan, Tuning, default_tuning, plan_chunks
from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["ChunkPlan", "Tuning", "chunk_attention", "default_tuning", "plan_chunks"]

LOG2_E = 1.4426950408889634


def chunk_attention(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    plan: ChunkPlan,
    scale: float,
    out_THE: Tensor,
) -> Tensor:
    """What each token of a plan's chunks sees of its sequence's keys up to itself.

    Args:
        q_THE: queries; the rows of other sequences are not read.
        keys_NPKE: the layer's keys.
        values_NPKE: the layer's values.
        query_starts: int32 [S + 1], where each sequence's tokens begin in T.
        kv_lens_S: int32, keys of each sequence, its chunk included.
        block_tables_SB: int32, blocks of each sequence in order; rows may lie apart, their entries next to each other.
        plan: of these starts and lengths.
        scale: what scores are multiplied by; positive.
        out_THE: written where a chunk has a token.

    Returns:
        `out_THE`.

    Raises:
        ValueError: shapes, types or layouts that do not fit each other.
    """
    _check(q_THE, keys_NPKE, values_NPKE, query_starts, kv_lens_S, block_tables_SB, out_THE, scale)
    arguments = (out_THE, q_THE, keys_NPKE, values_NPKE, query_starts, kv_lens_S, block_tables_SB)
    if runs_triton(q_THE):
        chunk_triton(*arguments, plan=plan, scale=scale)
    else:
        planned = set(plan.entries_J2[:, 0].tolist()) - {-1}
        chunk_reference(*arguments, sequences=sorted(planned), scale=scale)
    return out_THE


def _check(
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    out_THE: Tensor,
    scale: float,
) -> None:
    _, num_heads, head_dim = q_THE.shape
    _, _, num_kv_heads, key_dim = keys_NPKE.shape
    if keys_NPKE.shape != values_NPKE.shape or key_dim != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"queries {tuple(q_THE.shape)}, keys {tuple(keys_NPKE.shape)} and values {tuple(values_NPKE.shape)} "
            "do not fit each other"
        )
    if not q_THE.dtype == keys_NPKE.dtype == values_NPKE.dtype == out_THE.dtype or out_THE.shape != q_THE.shape:
        raise ValueError(
            f"queries {q_THE.dtype}, keys {keys_NPKE.dtype}, values {values_NPKE.dtype} and output {out_THE.dtype} "
            f"{tuple(out_THE.shape)} must be of one type, queries and output of one shape"
        )
    if not all(each.is_contiguous() for each in (q_THE, keys_NPKE, values_NPKE, out_THE, query_starts, kv_lens_S)):
        raise ValueError("queries, keys, values, output, lengths and starts must be contiguous")
    if not query_starts.dtype == kv_lens_S.dtype == block_tables_SB.dtype == torch.int32:
        raise ValueError("starts, lengths and block tables must be int32")
    if block_tables_SB.stride(1) != 1 or not len(query_starts) - 1 == len(kv_lens_S) == len(block_tables_SB):
        raise ValueError(
            f"{len(query_starts)} starts, {len(kv_lens_S)} lengths, block tables {tuple(block_tables_SB.shape)}: "
            "there must be one start more than sequences, and a table's entries next to each other"
        )
    if scale <= 0:
        raise ValueError(f"scores must be multiplied by a positive number, not {scale}")


def chunk_reference(
    out_THE: Tensor,
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    *,
    sequences: Iterable[int],
    scale: float,
) -> None:
    """Plain torch: one sequence after another."""
    starts: Sequence[int] = query_starts.tolist()
    kv_lens: Sequence[int] = kv_lens_S.tolist()
    for sequence in sequences:
        start, end, kv_len = starts[sequence], starts[sequence + 1], kv_lens[sequence]
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


def chunk_triton(
    out_THE: Tensor,
    q_THE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    query_starts: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    *,
    plan: ChunkPlan,
    scale: float,
) -> None:
    """One program for each of the plan's entries and each KV head; where an entry is empty it returns at once."""
    _, block_size, num_kv_heads, head_dim = keys_NPKE.shape
    rows, tile, num_warps, num_stages = plan.tuning
    _chunk_kernel[(len(plan.entries_J2) * num_kv_heads,)](
        out_THE,
        q_THE,
        keys_NPKE,
        values_NPKE,
        query_starts,
        kv_lens_S,
        block_tables_SB,
        plan.entries_J2,
        block_tables_SB.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=q_THE.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        TILE=tile,
        WIDTH=max(16, next_power_of_2(head_dim)),
        PRECISION="ieee" if q_THE.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["query_starts_ptr", "kv_lens_ptr", "tables_ptr", "entries_ptr"],
)
def _chunk_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    tables_ptr,
    entries_ptr,
    table_stride,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs read neighbouring heads of the same keys.
    entry, head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    sequence = tl.load(entries_ptr + 2 * entry)
    if sequence < 0:
        return
    first_row = tl.load(entries_ptr + 2 * entry + 1)
    start = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - start
    kv_len = tl.load(kv_lens_ptr + sequence)
    context = kv_len - query_len

    row, column = first_row + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    query = row // GROUP_SIZE
    rows = query * (NUM_KV_HEADS * GROUP_SIZE) + head * GROUP_SIZE + row % GROUP_SIZE
    q_offsets = rows[:, None] * HEAD_DIM + column[None, :]
    q_mask = (query < query_len)[:, None] & (column < HEAD_DIM)[None, :]
    chunk_offset = start.to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE * HEAD_DIM)
    q = tl.load(q_ptr + chunk_offset + q_offsets, mask=q_mask, other=0.0)
    last_seen = context + query
    seen_by_all = (context + first_row // GROUP_SIZE + 1) // TILE * TILE
    seen_by_any = tl.minimum(context + (first_row + ROWS - 1) // GROUP_SIZE + 1, kv_len)

    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    acc, peak, total = _add_keys(
        acc, peak, total, q, keys_ptr, values_ptr, table_ptr, head, 0, seen_by_all, last_seen, log2_scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, PRECISION, MASKED=False,
    )  # fmt: skip
    acc, peak, total = _add_keys(
        acc, peak, total, q, keys_ptr, values_ptr, table_ptr, head, seen_by_all, seen_by_any, last_seen, log2_scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, PRECISION, MASKED=True,
    )  # fmt: skip
    result = acc / total[:, None]
    tl.store(out_ptr + chunk_offset + q_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _add_keys(
    acc,
    peak,
    total,
    q,
    keys_ptr,
    values_ptr,
    table_ptr,
    head,
    begin,
    end,
    last_seen,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys from `begin` to `end`; without masks the stretch must be whole tiles."""
    place, column = tl.arange(0, TILE), tl.arange(0, WIDTH)
    # A tile's blocks are looked up while the tile before it is computed.
    blocks = tl.load(table_ptr + (begin + place) // BLOCK_SIZE, mask=begin + place < end, other=0)
    for at in range(begin, end, TILE):
        key = at + place
        slots = blocks.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        offsets = (slots * NUM_KV_HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        if MASKED:
            mask = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
            k = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        elif WIDTH == HEAD_DIM:
            k = tl.load(keys_ptr + offsets)
            v = tl.load(values_ptr + offsets)
        else:
            k = tl.load(keys_ptr + offsets, mask=(column < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values_ptr + offsets, mask=(column < HEAD_DIM)[None, :], other=0.0)
        blocks = tl.load(table_ptr + (key + TILE) // BLOCK_SIZE, mask=key + TILE < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            scores = tl.where((key[None, :] <= last_seen[:, None]) & (key < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total
