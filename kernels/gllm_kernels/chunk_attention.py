"""Causal attention of chunks of prompts over a paged cache that holds what came before them and the chunks themselves.

FlashAttention-2 (arXiv 2307.08691) with the query heads that share a KV head packed into the rows of one product:
a row is one query of one head. Each program has a block of rows and all their keys or a part of them (see
`chunk_plan`); those that all its rows see are read without masks.

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
        plan: of these starts and lengths; calls with one plan must follow each other on one stream.
        scale: what scores are multiplied by; positive.
        out_THE: written where a chunk has a token.

    Returns:
        `out_THE`.

    Raises:
        ValueError: shapes, types or layouts that do not fit each other.
    """
    _check(q_THE, keys_NPKE, values_NPKE, query_starts, kv_lens_S, block_tables_SB, out_THE, scale)
    _check_plan(plan, num_kv_heads=keys_NPKE.shape[2], head_dim=keys_NPKE.shape[3])
    arguments = (out_THE, q_THE, keys_NPKE, values_NPKE, query_starts, kv_lens_S, block_tables_SB)
    if runs_triton(q_THE):
        chunk_triton(*arguments, plan=plan, scale=scale)
    else:
        planned = set(plan.entries_J5[:, 0].tolist()) - {-1}
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


def _check_plan(plan: ChunkPlan, *, num_kv_heads: int, head_dim: int) -> None:
    num_places, planned_heads = plan.counters_CK.shape
    if planned_heads != num_kv_heads or (
        plan.scratch.numel() != num_places * num_kv_heads * plan.tuning.rows * (head_dim + 2)
    ):
        raise ValueError(f"the plan is of other heads than {num_kv_heads} KV heads of {head_dim} dimensions")


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
    width = max(16, next_power_of_2(head_dim))
    _chunk_kernel[(len(plan.entries_J5) * num_kv_heads,)](
        out_THE,
        q_THE,
        keys_NPKE,
        values_NPKE,
        query_starts,
        kv_lens_S,
        block_tables_SB,
        plan.entries_J5,
        plan.counters_CK,
        plan.scratch,
        len(plan.counters_CK),
        block_tables_SB.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=q_THE.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=plan.tuning.rows,
        TILE=plan.tuning.tile,
        WIDTH=width,
        MERGED=min(plan.tuning.rows, 32, max(1, 4096 // width)),
        PRECISION="ieee" if q_THE.dtype == torch.float32 else "tf32",
        num_warps=plan.tuning.num_warps,
        num_stages=plan.tuning.num_stages,
    )


@triton.jit(
    do_not_specialize=["num_places", "table_stride"],
    do_not_specialize_on_alignment=["query_starts_ptr", "kv_lens_ptr", "tables_ptr", "entries_ptr", "counters_ptr"],
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
    counters_ptr,
    scratch_ptr,
    num_places,
    table_stride,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs read neighbouring heads of the same keys.
    entry, head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    sequence = tl.load(entries_ptr + 5 * entry)
    if sequence < 0:
        return
    first_row = tl.load(entries_ptr + 5 * entry + 1)
    part = tl.load(entries_ptr + 5 * entry + 2)
    num_parts = tl.load(entries_ptr + 5 * entry + 3)
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
    tiles_seen_by_all = (context + first_row // GROUP_SIZE + 1) // TILE
    begin = tiles_seen_by_all * part // num_parts * TILE
    end = tiles_seen_by_all * (part + 1) // num_parts * TILE
    masked_end = tl.minimum(context + (first_row + ROWS - 1) // GROUP_SIZE + 1, kv_len)
    masked_end = tl.where(part == num_parts - 1, masked_end, end)

    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    acc, peak, total = _add_keys(
        acc, peak, total, q, keys_ptr, values_ptr, table_ptr, head, begin, end, last_seen, log2_scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, PRECISION, MASKED=False,
    )  # fmt: skip
    acc, peak, total = _add_keys(
        acc, peak, total, q, keys_ptr, values_ptr, table_ptr, head, end, masked_end, last_seen, log2_scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, PRECISION, MASKED=True,
    )  # fmt: skip
    if num_parts == 1:
        result = acc / total[:, None]
        tl.store(out_ptr + chunk_offset + q_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        place = tl.load(entries_ptr + 5 * entry + 4)
        part_row = ((place + part) * NUM_KV_HEADS + head) * ROWS + tl.arange(0, ROWS)
        stats_ptr = scratch_ptr + num_places * NUM_KV_HEADS * ROWS * HEAD_DIM
        tl.store(scratch_ptr + part_row[:, None] * HEAD_DIM + column[None, :], acc, mask=q_mask)
        tl.store(stats_ptr + part_row, peak, mask=query < query_len)
        tl.store(stats_ptr + num_places * NUM_KV_HEADS * ROWS + part_row, total, mask=query < query_len)
        counter_ptr = counters_ptr + place * NUM_KV_HEADS + head
        tl.debug_barrier()  # all of this program's stores come before its announcement
        num_before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if num_before == num_parts - 1:
            tl.store(counter_ptr, 0)
            _merge(
                out_ptr + chunk_offset, scratch_ptr, stats_ptr, place, num_parts, head, first_row,
                tl.minimum(ROWS, query_len * GROUP_SIZE - first_row), num_places,
                NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, ROWS, WIDTH, MERGED,
            )  # fmt: skip


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


@triton.jit
def _merge(
    out_ptr,
    scratch_ptr,
    stats_ptr,
    place,
    num_parts,
    head,
    first_row,
    num_rows,
    num_places,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Write a block's result for one KV head from what its parts left, `MERGED` rows at a time, parts in their order.

    That was written by other multiprocessors a moment ago: read past this one's own cache (.cg).
    """
    column = tl.arange(0, WIDTH)
    totals_ptr = stats_ptr + num_places * NUM_KV_HEADS * ROWS
    for first in range(0, num_rows, MERGED):
        row = first + tl.arange(0, MERGED)
        source = tl.minimum(row, num_rows - 1)  # those beyond the chunk repeat its last and are not stored
        peak = tl.full([MERGED], float("-inf"), tl.float32)
        total = tl.zeros([MERGED], tl.float32)
        acc = tl.zeros([MERGED, WIDTH], tl.float32)
        for at in range(0, num_parts, 4):
            for each in tl.static_range(4):  # whose loads are on their way together
                there = at + each < num_parts
                part_row = ((place + at + each) * NUM_KV_HEADS + head) * ROWS + source
                its_peak = tl.load(stats_ptr + part_row, mask=there, other=float("-inf"), cache_modifier=".cg")
                its_total = tl.load(totals_ptr + part_row, mask=there, other=0.0, cache_modifier=".cg")
                its_acc = tl.load(
                    scratch_ptr + part_row[:, None] * HEAD_DIM + column[None, :],
                    mask=(column < HEAD_DIM)[None, :] & there,
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_peak = tl.maximum(peak, its_peak)
                share, fade = tl.exp2(its_peak - new_peak), tl.exp2(peak - new_peak)
                total = total * fade + its_total * share
                acc = acc * fade[:, None] + its_acc * share[:, None]
                peak = new_peak
        result = acc / total[:, None]
        rows = (first_row + row) // GROUP_SIZE * (NUM_KV_HEADS * GROUP_SIZE) + (first_row + row) % GROUP_SIZE
        offsets = (rows + head * GROUP_SIZE)[:, None] * HEAD_DIM + column[None, :]
        mask = (row < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)
