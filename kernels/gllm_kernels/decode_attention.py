"""Attention of sequences with one query each over a paged cache, their keys shared out evenly (see `decode_plan`).

Shapes: S sequences, H query heads, K KV heads, G = H / K query heads per KV head, E head dimension, N blocks of the
cache, P tokens per block, B blocks of a sequence, L keys of a sequence (padded to the longest).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gllm_kernels.decode_plan import DecodePlan, Tuning, default_tuning, plan_decode
from gllm_kernels.early_start import await_previous, launch_options, let_next_start
from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DecodePlan", "Tuning", "decode_attention", "default_tuning", "plan_decode"]

LOG2_E = 1.4426950408889634


def decode_attention(
    q_SHE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    *,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    plan: DecodePlan,
    scale: float,
    out_SHE: Tensor | None = None,
) -> Tensor:
    """What each sequence's one query sees of all its keys, [S, H, E] in q's dtype; zeros where there are no keys.

    Args:
        q_SHE: queries.
        keys_NPKE: the layer's keys.
        values_NPKE: the layer's values.
        kv_lens_S: int32, keys of each sequence.
        block_tables_SB: int32, blocks of each sequence in order; rows may lie apart, their entries next to each other.
        plan: of these lengths; calls with one plan must follow each other on one stream.
        scale: what scores are multiplied by.
        out_SHE: where to write; may be rows of a larger tensor.

    Raises:
        ValueError: shapes, types or layouts that do not fit each other.
    """
    _check(q_SHE, keys_NPKE, values_NPKE, kv_lens_S, block_tables_SB, plan)
    if out_SHE is None:
        out_SHE = torch.empty_like(q_SHE)
    elif out_SHE.shape != q_SHE.shape or out_SHE.dtype != q_SHE.dtype or not out_SHE.is_contiguous():
        raise ValueError(f"the output must be contiguous {q_SHE.dtype} {tuple(q_SHE.shape)}")
    arguments = (q_SHE, keys_NPKE, values_NPKE, kv_lens_S, block_tables_SB)
    if runs_triton(q_SHE):
        decode_triton(out_SHE, *arguments, plan=plan, scale=scale)
    else:
        decode_reference(out_SHE, *arguments, scale=scale)
    return out_SHE


def _check(
    q_SHE: Tensor, keys_NPKE: Tensor, values_NPKE: Tensor, kv_lens_S: Tensor, block_tables_SB: Tensor, plan: DecodePlan
) -> None:
    num_sequences, num_heads, head_dim = q_SHE.shape
    _, _, num_kv_heads, key_dim = keys_NPKE.shape
    if keys_NPKE.shape != values_NPKE.shape or key_dim != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"queries {tuple(q_SHE.shape)}, keys {tuple(keys_NPKE.shape)} and values {tuple(values_NPKE.shape)} "
            "do not fit each other"
        )
    if not q_SHE.dtype == keys_NPKE.dtype == values_NPKE.dtype:
        raise ValueError(f"queries, keys and values differ: {q_SHE.dtype}, {keys_NPKE.dtype}, {values_NPKE.dtype}")
    if not (q_SHE.is_contiguous() and keys_NPKE.is_contiguous() and values_NPKE.is_contiguous()):
        raise ValueError("queries, keys and values must be contiguous")
    if kv_lens_S.dtype != torch.int32 or block_tables_SB.dtype != torch.int32 or block_tables_SB.stride(1) != 1:
        raise ValueError("lengths and block tables must be int32, entries of a table next to each other")
    if not num_sequences == len(kv_lens_S) == len(block_tables_SB) == len(plan.counters_SK):
        raise ValueError(
            f"{num_sequences} queries, {len(kv_lens_S)} lengths, {len(block_tables_SB)} block tables, "
            f"a plan of {len(plan.counters_SK)} sequences"
        )
    if plan.counters_SK.shape[1] != num_kv_heads or (
        plan.scratch.numel() != 2 * len(plan.spans_W2) * num_heads * 2 * head_dim
    ):
        raise ValueError("the plan is of other heads")


def decode_reference(
    out_SHE: Tensor,
    q_SHE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    *,
    scale: float,
) -> None:
    """Plain torch: gather every sequence's keys, padded to the width of the tables, and mask the padding."""
    k_SLKE = keys_NPKE[block_tables_SB].flatten(1, 2).float()
    v_SLKE = values_NPKE[block_tables_SB].flatten(1, 2).float()
    beyond_SL = torch.arange(k_SLKE.shape[1], device=q_SHE.device) >= kv_lens_S[:, None]
    v_SLKE = v_SLKE.masked_fill(beyond_SL[:, :, None, None], 0)  # whatever lies there: zero times NaN is NaN
    q_SKGE = q_SHE.float().reshape(len(q_SHE), keys_NPKE.shape[2], -1, q_SHE.shape[2]) * scale
    scores_SKGL = q_SKGE @ k_SLKE.permute(0, 2, 3, 1)
    # The least number rather than minus infinity: an empty sequence (padding of a batch) then gives no NaN.
    weights_SKGL = scores_SKGL.masked_fill_(beyond_SL[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
    out_SHE.copy_((weights_SKGL @ v_SLKE.permute(0, 2, 1, 3)).flatten(1, 2))


def decode_triton(
    out_SHE: Tensor,
    q_SHE: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    kv_lens_S: Tensor,
    block_tables_SB: Tensor,
    *,
    plan: DecodePlan,
    scale: float,
) -> None:
    """One launch, whose size depends on the plan's workers alone."""
    _, block_size, num_kv_heads, head_dim = keys_NPKE.shape
    group_size = q_SHE.shape[1] // num_kv_heads
    group = next_power_of_2(group_size)
    members = min(group, 8)  # merged at a time, of as many parts as registers hold
    _decode_kernel[(len(plan.spans_W2) * num_kv_heads,)](
        out_SHE,
        q_SHE,
        keys_NPKE,
        values_NPKE,
        kv_lens_S,
        block_tables_SB,
        plan.bounds_S,
        plan.spans_W2,
        plan.quota,
        plan.counters_SK,
        plan.scratch,
        block_tables_SB.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=plan.tuning.tile,
        ROWS=max(16, group),
        WIDTH=max(16, next_power_of_2(head_dim)),
        MEMBERS=members,
        PARTS=16 // members,
        PRECISION="ieee" if q_SHE.dtype == torch.float32 else "tf32",
        **launch_options(allowed=plan.for_later),
        num_warps=plan.tuning.num_warps,
        num_stages=plan.tuning.num_stages,
    )


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=[
        "kv_lens_ptr",
        "tables_ptr",
        "bounds_ptr",
        "spans_ptr",
        "quota_ptr",
        "counters_ptr",
    ],  # parts of larger tensors: where they begin varies with the batch
)
def _decode_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    kv_lens_ptr,
    tables_ptr,
    bounds_ptr,
    spans_ptr,
    quota_ptr,
    counters_ptr,
    scratch_ptr,
    table_stride,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    # Neighbouring programs read neighbouring heads of the same keys, at about the same time.
    worker, head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    weights_ptr = scratch_ptr + 2 * tl.num_programs(0) * GROUP_SIZE * HEAD_DIM
    quota = tl.load(quota_ptr)
    first_sequence = tl.load(spans_ptr + 2 * worker)
    last_sequence = tl.load(spans_ptr + 2 * worker + 1)
    worker_tile = worker * quota
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    q_mask = (row < GROUP_SIZE)[:, None] & (column < HEAD_DIM)[None, :]
    q_offsets = (head * GROUP_SIZE + row)[:, None] * HEAD_DIM + column[None, :]
    await_previous(EARLY)  # only now: the plan was there before the kernel ahead began (`for_later`)
    for sequence in range(first_sequence, last_sequence + 1):
        begin_tile = tl.load(bounds_ptr + sequence)
        end_tile = tl.load(bounds_ptr + sequence + 1)
        kv_len = tl.load(kv_lens_ptr + sequence)
        sequence_offset = sequence * NUM_KV_HEADS * GROUP_SIZE * HEAD_DIM
        q = tl.load(q_ptr + sequence_offset + q_offsets, mask=q_mask, other=0.0)
        table_ptr = tables_ptr + sequence * table_stride
        begin = (tl.maximum(worker_tile, begin_tile) - begin_tile) * TILE
        end = tl.minimum((tl.minimum(worker_tile + quota, end_tile) - begin_tile) * TILE, kv_len)
        acc, peak, total = _attend(
            q, keys_ptr, values_ptr, table_ptr, begin, end, head, log2_scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, ROWS, WIDTH, PRECISION,
        )  # fmt: skip
        first_worker = begin_tile // quota
        num_parts = (end_tile - 1) // quota - first_worker + 1
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # no keys: nothing was added up
        if num_parts == 1:
            tl.store(out_ptr + sequence_offset + q_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            # A stretch touches at most two sequences that it shares: one begun before it, one that goes on after it.
            part = (2 * worker + (worker == first_worker).to(tl.int32)) * NUM_KV_HEADS + head
            part_offsets = (part * GROUP_SIZE + row)[:, None] * HEAD_DIM + column[None, :]
            tl.store(scratch_ptr + part_offsets, result, mask=q_mask)
            weight = tl.broadcast_to((peak + tl.log2(total))[:, None], [ROWS, WIDTH])
            tl.store(weights_ptr + part_offsets, weight, mask=q_mask)
            counter_ptr = counters_ptr + sequence * NUM_KV_HEADS + head
            tl.debug_barrier()  # all of this program's stores come before its announcement
            num_before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if num_before == num_parts - 1:
                tl.store(counter_ptr, 0)
                _merge(
                    out_ptr + sequence_offset, scratch_ptr, weights_ptr, first_worker, num_parts, head,
                    NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, WIDTH, MEMBERS, PARTS,
                )  # fmt: skip


@triton.jit
def _attend(
    q,
    keys_ptr,
    values_ptr,
    table_ptr,
    begin,
    end,
    head,
    log2_scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What queries see of keys [begin, end): values weighed by 2^(score - peak), those peaks, the sums of weights."""
    column, place = tl.arange(0, WIDTH), tl.arange(0, TILE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    # A tile's blocks are looked up while the tile before it is computed.
    blocks = tl.load(table_ptr + (begin + place) // BLOCK_SIZE, mask=begin + place < end, other=0)
    for at in range(begin, end, TILE):
        key = at + place
        slots = blocks.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        offsets = (slots * NUM_KV_HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        mask = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
        k = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        blocks = tl.load(table_ptr + (key + TILE) // BLOCK_SIZE, mask=key + TILE < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        scores = tl.where((key < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _merge(
    out_ptr,
    scratch_ptr,
    weights_ptr,
    first_worker,
    num_parts,
    head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write one sequence's result for one KV head from what its workers left, a few members of the group at a time.

    A batch waits for this at its end: every element has its weight beside it, so that nothing moves between threads,
    and PARTS parts are on their way at once. Other multiprocessors wrote them a moment ago: read past this one's own
    cache (.cg).
    """
    column = tl.arange(0, WIDTH)[None, :]
    for first_member in range(0, GROUP_SIZE, MEMBERS):
        member = first_member + tl.arange(0, MEMBERS)[:, None]
        held = (member < GROUP_SIZE) & (column < HEAD_DIM)
        peak = tl.full([MEMBERS, WIDTH], float("-inf"), tl.float32)
        total = tl.zeros([MEMBERS, WIDTH], tl.float32)
        acc = tl.zeros([MEMBERS, WIDTH], tl.float32)
        for at in range(0, num_parts, PARTS):
            for step in tl.static_range(PARTS):
                index = at + step
                part = (2 * (first_worker + index) + (index == 0).to(tl.int32)) * NUM_KV_HEADS + head
                offsets = (part * GROUP_SIZE + member) * HEAD_DIM + column
                there = held & (index < num_parts)
                nothing = tl.where(index < num_parts, 0.0, float("-inf"))  # what is not held has weights, too: no NaN
                result = tl.load(scratch_ptr + offsets, mask=there, other=0.0, cache_modifier=".cg")
                weight = tl.load(weights_ptr + offsets, mask=there, other=nothing, cache_modifier=".cg")
                new_peak = tl.maximum(peak, weight)
                fade, share = tl.exp2(peak - new_peak), tl.exp2(weight - new_peak)
                total = total * fade + share
                acc = acc * fade + result * share
                peak = new_peak
        offsets = (head * GROUP_SIZE + member) * HEAD_DIM + column
        tl.store(out_ptr + offsets, (acc / total).to(out_ptr.dtype.element_ty), mask=held)
