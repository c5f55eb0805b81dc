"""Which rows of which chunk each program of the chunk kernel computes.

The tokens of a chunk, each once for every query head of a group, are its rows, and a block of them is a program's work.
Chunks of all lengths share a step, so who gets what is told by a list, made once a step on the device for all layers.

Shapes: S sequences, J entries of the list.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.decode_plan import planned_sequences
from gllm_kernels.jit import runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

PLANNED_ENTRIES = 16  # that one program of the planning kernel finds


class Tuning(NamedTuple):
    """How the kernel runs; never what it computes."""

    rows: int  # (query, head) pairs of a program
    tile: int  # keys read at a time
    num_warps: int
    num_stages: int


class ChunkPlan(NamedTuple):
    """Work of a step's programs: made once a step on the device, used by all layers."""

    entries_J2: Tensor  # int32, a sequence and the first of its rows; -1 for a sequence: nothing to do
    tuning: Tuning


@lru_cache
def default_tuning(head_dim: int, dtype: torch.dtype) -> Tuning:
    """What suits an H200."""
    if dtype == torch.float32:
        return Tuning(rows=16, tile=16, num_warps=4, num_stages=1)
    if head_dim > 128:
        return Tuning(rows=128, tile=32, num_warps=8, num_stages=2)
    return Tuning(rows=128, tile=64, num_warps=8, num_stages=3)


def plan_chunks(
    query_starts: Tensor,
    kv_lens_S: Tensor,
    num_decodes_1: Tensor,
    *,
    max_tokens: int,
    max_chunks: int,
    group_size: int,
    head_dim: int,
    dtype: torch.dtype,
    tuning: Tuning | None = None,
) -> ChunkPlan:
    """List the work of chunks of prompts. Nothing but sizes is decided on the host.

    Args:
        query_starts: int32 [S + 1], where each sequence's tokens begin.
        kv_lens_S: int32, keys of each sequence, its chunk included; 0: padding, whose tokens attend to nothing.
        num_decodes_1: int32, sequences at the front that have no chunk.
        max_tokens: of all chunks together, at most.
        max_chunks: how many there are at most.
        group_size: query heads per KV head.
        head_dim: of keys and values.
        dtype: of the cache.
        tuning: instead of what suits these shapes.

    Raises:
        ValueError: starts, lengths or the number of decodes of another type or shape.
    """
    tensors = (query_starts, kv_lens_S, num_decodes_1)
    if any(each.dtype != torch.int32 or not each.is_contiguous() for each in tensors):
        raise ValueError("plan_chunks needs contiguous int32 starts, lengths and number of decodes")
    if len(query_starts) != len(kv_lens_S) + 1 or num_decodes_1.numel() != 1:
        raise ValueError(
            f"{len(query_starts)} starts, {len(kv_lens_S)} lengths, {num_decodes_1.numel()} numbers of decodes: there "
            "must be one start more than lengths, and one number"
        )
    tuning = tuning or default_tuning(head_dim, dtype)
    num_entries = max_tokens * group_size // tuning.rows + max_chunks  # a chunk's last block may be any part of one
    plan = ChunkPlan(torch.empty(num_entries, 2, dtype=torch.int32, device=kv_lens_S.device), tuning)
    (plan_triton if runs_triton(kv_lens_S) else plan_reference)(plan, *tensors, group_size=group_size)
    return plan


def plan_reference(
    plan: ChunkPlan, query_starts: Tensor, kv_lens_S: Tensor, num_decodes_1: Tensor, *, group_size: int
) -> None:
    """Plain torch, written into the plan."""
    rows = plan.tuning.rows
    counts_S = query_starts.diff().masked_fill(kv_lens_S == 0, 0)
    counts_S[: int(num_decodes_1)] = 0
    blocks_S = (counts_S * group_size + (rows - 1)).div(rows, rounding_mode="floor")
    owners = torch.repeat_interleave(blocks_S.long())
    first_rows = (torch.arange(len(owners), device=owners.device) - (blocks_S.cumsum(0) - blocks_S)[owners]) * rows
    plan.entries_J2.fill_(-1)
    plan.entries_J2[: len(owners)] = torch.stack((owners, first_rows), 1).flip(0).to(torch.int32)


def plan_triton(
    plan: ChunkPlan, query_starts: Tensor, kv_lens_S: Tensor, num_decodes_1: Tensor, *, group_size: int
) -> None:
    """The same in one launch; its programs each add up all chunks."""
    num_entries, num_sequences = len(plan.entries_J2), len(kv_lens_S)
    _plan_chunks_kernel[(-(-num_entries // PLANNED_ENTRIES),)](
        plan.entries_J2,
        query_starts,
        kv_lens_S,
        num_decodes_1,
        num_entries,
        num_sequences,
        GROUP_SIZE=group_size,
        ROWS=plan.tuning.rows,
        SEQUENCES=planned_sequences(num_sequences),
        ENTRIES=PLANNED_ENTRIES,
    )


@triton.jit(
    do_not_specialize=["num_entries", "num_sequences"],
    do_not_specialize_on_alignment=["query_starts_ptr", "kv_lens_ptr", "num_decodes_ptr"],
)
def _plan_chunks_kernel(
    entries_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    num_decodes_ptr,
    num_entries,
    num_sequences,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    has_chunk = (sequence < num_sequences) & (sequence >= tl.load(num_decodes_ptr))
    has_chunk &= tl.load(kv_lens_ptr + sequence, mask=has_chunk, other=0) > 0
    start = tl.load(query_starts_ptr + sequence, mask=has_chunk, other=0)
    end = tl.load(query_starts_ptr + sequence + 1, mask=has_chunk, other=0)
    blocks = ((end - start) * GROUP_SIZE + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, 0)
    num_blocks = tl.sum(blocks, 0)
    # The last rows of a chunk see the most keys: they go first, so that no long program starts at the end.
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    at = num_blocks - 1 - entry
    before = ends[None, :] <= at[:, None]
    owner = tl.sum(before.to(tl.int32), 1)
    first_row = (at - tl.sum(tl.where(before, blocks[None, :], 0), 1)) * ROWS
    tl.store(entries_ptr + 2 * entry, tl.where(at >= 0, owner, -1), mask=entry < num_entries)
    tl.store(entries_ptr + 2 * entry + 1, tl.where(at >= 0, first_row, -1), mask=entry < num_entries)
