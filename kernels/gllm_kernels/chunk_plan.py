"""Which rows of which chunk each program of the chunk kernel computes, and over which of their keys.

The tokens of a chunk, each once for every query head of a group, are its rows, and a block of them is a program's work.
Chunks of all lengths share a step, so who gets what is told by a list, made once a step on the device for all layers.

Few blocks with many keys leave most of a GPU idle. Their keys are then cut into parts, as Flash-Decoding (Dao et al.,
2023) does for single queries: each part is a program's work, and whoever comes last merges what all left in float32.
Only tiles that all rows of a block see are dealt; the last part has those at the diagonal besides, so that no row finds
a part empty. Where whole blocks fill the GPU once or more often, those that are left over may be cut alone, so that the
last wave is a short one (`chunk_cut` says how far to cut).

Blocks are listed in the order of chunks, a chunk's last rows, which see the most keys, first: a prompt that goes on
comes before those that start in its step. Where the last chunk has more keys before it than the first one, as after a
hit in the prefix cache, the chunks are listed backwards. So long programs do not start when the others end.

Shapes: S sequences, J entries of the list, K KV heads, C parts of cut blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.chunk_cut import MOST_PARTS, divide_up, find_cut, find_cut_reference
from gllm_kernels.decode_plan import planned_sequences
from gllm_kernels.jit import next_power_of_2, num_multiprocessors, runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

PLANNED_BLOCKS = 16  # that one program of the planning kernel lists


class Tuning(NamedTuple):
    """How the kernel runs; never what it computes."""

    rows: int  # (query, head) pairs of a program
    tile: int  # keys read at a time
    num_warps: int
    num_stages: int
    least_tiles: int = 4  # that a part has
    programs_per_multiprocessor: int = 2  # that parts of cut blocks are to make up at most


class ChunkPlan(NamedTuple):
    """Work of a step's programs: made once a step on the device, used by all layers one after another."""

    entries_J5: Tensor
    """int32: a sequence, the first of its rows, which part of their keys, of how many, and the first of these parts'
    places in the scratch. -1 for a sequence: nothing to do."""
    counters_CK: Tensor  # int32, how many parts are there, at the first part's place; zero between calls
    scratch: Tensor  # float32, room for C partial results of each KV head
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
    num_kv_heads: int,
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
        num_kv_heads: KV heads of this rank.
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
    num_blocks = max_tokens * group_size // tuning.rows + max_chunks  # a chunk's last block may be any part of one
    plan = _empty_plan(num_blocks, num_kv_heads, head_dim, tuning, kv_lens_S.device)
    (plan_triton if runs_triton(kv_lens_S) else plan_reference)(plan, *tensors, group_size=group_size)
    return plan


def _empty_plan(num_blocks: int, num_kv_heads: int, head_dim: int, tuning: Tuning, device: torch.device) -> ChunkPlan:
    num_parts = count_places(tuning, num_kv_heads, device)
    entries = torch.empty(num_blocks + num_parts, 5, dtype=torch.int32, device=device)
    counters = torch.empty(num_parts, num_kv_heads, dtype=torch.int32, device=device)
    scratch = torch.empty(counters.numel() * tuning.rows * (head_dim + 2), dtype=torch.float32, device=device)
    return ChunkPlan(entries, counters, scratch, tuning)


def count_places(tuning: Tuning, num_kv_heads: int, device: torch.device) -> int:
    """How many parts a plan has room for.

    Twice what is aimed at: that counts chunks with their means, and a block that finds no place stays whole.
    """
    return 2 * max(2, num_multiprocessors(device) * tuning.programs_per_multiprocessor // num_kv_heads)


def plan_reference(
    plan: ChunkPlan, query_starts: Tensor, kv_lens_S: Tensor, num_decodes_1: Tensor, *, group_size: int
) -> None:
    """Plain torch, written into the plan."""
    rows, tile = plan.tuning.rows, plan.tuning.tile
    has_chunk_S = kv_lens_S > 0
    has_chunk_S[: int(num_decodes_1)] = False
    counts_S = torch.where(has_chunk_S, query_starts.diff(), 0).long()
    contexts_S = torch.where(has_chunk_S, kv_lens_S, 0) - counts_S
    blocks_S = (counts_S * group_size + (rows - 1)) // rows
    is_backwards = _is_backwards(blocks_S, contexts_S)
    owners = torch.repeat_interleave(blocks_S)
    listed = torch.arange(len(owners), device=owners.device)
    first_rows = (blocks_S.cumsum(0)[owners] - 1 - listed) * rows  # of a chunk, the last ones first
    if is_backwards:
        owners, first_rows = owners.flip(0), ((blocks_S - 1)[owners] * rows - first_rows).flip(0)
    tiles = (contexts_S[owners] + first_rows // group_size + 1) // tile
    width = num_multiprocessors(owners.device)
    cut = find_cut_reference(plan, blocks_S, contexts_S, counts_S, width=width, is_backwards=is_backwards)
    wanted = divide_up(tiles, cut.quota).clamp(min=1)
    of_left = (tiles // plan.tuning.least_tiles).clamp(min=1, max=cut.parts_of_left)
    wanted = torch.where(listed < len(owners) - cut.num_left, wanted, of_left)
    in_scratch = wanted * (wanted > 1)
    places = in_scratch.cumsum(0) - in_scratch
    fits = places + in_scratch <= len(plan.counters_CK)
    num_parts = torch.where(fits, wanted, 1)
    of = torch.repeat_interleave(num_parts)
    part = torch.arange(len(of), device=of.device) - (num_parts.cumsum(0) - num_parts)[of]
    entries = owners[of], first_rows[of], part, num_parts[of], (places * (num_parts > 1))[of]
    plan.entries_J5.fill_(-1)
    plan.entries_J5[: len(of)] = torch.stack(entries, 1).int()
    plan.counters_CK.zero_()


def _is_backwards(blocks_S: Tensor, contexts_S: Tensor) -> bool:
    """Whether the last chunk has more keys before it than the first."""
    chunks = blocks_S.nonzero()[:, 0]
    return len(chunks) > 0 and bool(contexts_S[chunks[-1]] > contexts_S[chunks[0]])


def plan_triton(
    plan: ChunkPlan, query_starts: Tensor, kv_lens_S: Tensor, num_decodes_1: Tensor, *, group_size: int
) -> None:
    """The same in one launch; its programs each add up all chunks."""
    (num_entries, _), (num_places, num_kv_heads) = plan.entries_J5.shape, plan.counters_CK.shape
    num_sequences = len(kv_lens_S)
    _plan_chunks_kernel[(-(-num_entries // PLANNED_BLOCKS),)](
        plan.entries_J5,
        plan.counters_CK,
        query_starts,
        kv_lens_S,
        num_decodes_1,
        num_entries,
        num_places,
        num_sequences,
        num_multiprocessors(kv_lens_S.device),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        ROWS=plan.tuning.rows,
        TILE=plan.tuning.tile,
        LEAST=plan.tuning.least_tiles,
        PARTS=MOST_PARTS,
        SEQUENCES=planned_sequences(num_sequences),
        BLOCKS=PLANNED_BLOCKS,
        COUNTERS=next_power_of_2(num_places * num_kv_heads),
        num_warps=8 if num_sequences > 64 else 4,
    )


@triton.jit(
    do_not_specialize=["num_entries", "num_places", "num_sequences", "num_multiprocessors"],
    do_not_specialize_on_alignment=["query_starts_ptr", "kv_lens_ptr", "num_decodes_ptr"],
)
def _plan_chunks_kernel(
    entries_ptr,
    counters_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    num_decodes_ptr,
    num_entries,
    num_places,
    num_sequences,
    num_multiprocessors,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    has_chunk = (sequence < num_sequences) & (sequence >= tl.load(num_decodes_ptr))
    kv_lens = tl.load(kv_lens_ptr + sequence, mask=has_chunk, other=0)
    has_chunk &= kv_lens > 0
    start = tl.load(query_starts_ptr + sequence, mask=has_chunk, other=0)
    counts = tl.load(query_starts_ptr + sequence + 1, mask=has_chunk, other=0) - start
    contexts = kv_lens - counts
    blocks = (counts * GROUP_SIZE + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, 0)
    num_blocks = tl.sum(blocks, 0)
    most = tl.maximum(tl.max(kv_lens, 0) // TILE, 1)
    first_context, last_context = _contexts_at_ends(sequence, blocks, contexts, SEQUENCES)
    is_backwards = last_context > first_context
    quota, num_left, parts_of_left = most, 0, 1
    if (most >= 2 * LEAST) & (num_blocks > 0):
        shortest = tl.minimum(first_context, last_context) // TILE + 1
        quota, num_left, parts_of_left = find_cut(
            blocks, contexts, counts, most, shortest, num_places, num_multiprocessors, NUM_KV_HEADS, TILE, LEAST, PARTS
        )

    own = tl.program_id(0) * BLOCKS
    is_cut = (quota < most) | (num_left > 0)
    first, until, num_before, places_before = own, own + 1, own, own * 0
    if is_cut:  # where a block's entries are depends on all before it
        first, until, num_before = own * 0, tl.maximum(num_blocks, own + 1), own * 0
    for at in range(first, until, BLOCKS):
        block = at + tl.arange(0, BLOCKS)
        owner, first_row, tiles = _look_up(
            block, num_blocks, is_backwards, sequence, blocks, contexts, ends, GROUP_SIZE, ROWS, TILE
        )
        wanted = tl.maximum((tiles + quota - 1) // quota, 1)
        of_left = tl.maximum(tl.minimum(tiles // LEAST, parts_of_left), 1)
        wanted = tl.where(block < num_blocks - num_left, wanted, of_left)
        wanted = tl.where(block < num_blocks, wanted, 0)
        in_scratch = tl.where(wanted > 1, wanted, 0)
        place = places_before + tl.cumsum(in_scratch, 0) - in_scratch
        num_parts = tl.where(place + in_scratch <= num_places, wanted, tl.minimum(wanted, 1))
        if at == own:
            entry = num_before + tl.cumsum(num_parts, 0) - num_parts
            _list_parts(entries_ptr, entry, num_parts, owner, first_row, place)
        places_before += tl.sum(in_scratch, 0)
        num_before += tl.sum(num_parts, 0)

    num_listed = tl.where(is_cut, num_before, num_blocks)
    number = 5 * own + tl.arange(0, 8 * BLOCKS)  # of this program's share of the list
    empty = (number >= 5 * num_listed) & (number < 5 * tl.minimum(own + BLOCKS, num_entries))
    tl.store(entries_ptr + number, -1, mask=empty)
    if own == 0:
        counter = tl.arange(0, COUNTERS)
        tl.store(counters_ptr + counter, 0, mask=counter < num_places * NUM_KV_HEADS)


@triton.jit
def _contexts_at_ends(sequence, blocks, contexts, SEQUENCES: tl.constexpr):
    """Keys before the first chunk and before the last; a chunk has blocks."""
    first = tl.min(tl.where(blocks > 0, sequence, SEQUENCES), 0)
    last = tl.max(tl.where(blocks > 0, sequence, -1), 0)
    first_context = tl.sum(tl.where(sequence == first, contexts, 0), 0)
    return first_context, tl.sum(tl.where(sequence == last, contexts, 0), 0)


@triton.jit
def _look_up(
    block,
    num_blocks,
    is_backwards,
    sequence,
    blocks,
    contexts,
    ends,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of listed blocks whose they are, their first rows, and the tiles that all rows see."""
    place = tl.where(is_backwards, num_blocks - 1 - block, block)
    owner = tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), 1)
    is_owner = sequence[None, :] == owner[:, None]
    begin = tl.sum(tl.where(is_owner, (ends - blocks)[None, :], 0), 1)
    end = tl.sum(tl.where(is_owner, ends[None, :], 0), 1)
    # Of a chunk, the last rows come first.
    first_row = tl.where(is_backwards, place - begin, end - 1 - place) * ROWS
    context = tl.sum(tl.where(is_owner, contexts[None, :], 0), 1)
    return owner, first_row, (context + first_row // GROUP_SIZE + 1) // TILE


@triton.jit
def _list_parts(entries_ptr, entry, num_parts, owner, first_row, place):
    """Write the entries of blocks, each block's from `entry` on."""
    for part in range(tl.max(num_parts, 0)):
        to_ptr, listed = entries_ptr + 5 * (entry + part), part < num_parts
        tl.store(to_ptr, owner, mask=listed)
        tl.store(to_ptr + 1, first_row, mask=listed)
        tl.store(to_ptr + 2, part, mask=listed)
        tl.store(to_ptr + 3, num_parts, mask=listed)
        tl.store(to_ptr + 4, tl.where(num_parts > 1, place, 0), mask=listed)
