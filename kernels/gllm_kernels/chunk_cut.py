"""How far the blocks of a step's chunks are cut (see `chunk_plan`): the least of a small table of costs.

Shapes: S sequences, F candidates of how far to cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.jit import tl, triton

if TYPE_CHECKING:
    from torch import Tensor

    from gllm_kernels.chunk_plan import ChunkPlan

MOST_PARTS = 32  # of a block, a power of two: one program merges them


class Cut(NamedTuple):
    """How far to cut."""

    quota: int  # tiles of a part at most
    num_left: int = 0  # blocks at the end of the list that are cut alone
    parts_of_left: int = 1  # at most


def find_cut_reference(
    plan: ChunkPlan, blocks_S: Tensor, contexts_S: Tensor, counts_S: Tensor, *, width: int, is_backwards: bool
) -> Cut:
    """The cheapest way, as `find_cut` says, on so many multiprocessors; plain torch."""
    least, tile, (num_places, num_kv_heads) = plan.tuning.least_tiles, plan.tuning.tile, plan.counters_CK.shape
    most, chunks = max(int((contexts_S + counts_S).amax()) // tile, 1), blocks_S.nonzero()[:, 0]
    if most < 2 * least or not len(chunks):
        return Cut(most)
    shortest = int(contexts_S[chunks[0 if is_backwards else -1]]) // tile + 1
    parts_F = torch.arange(1, MOST_PARTS + 1, device=blocks_S.device)
    quotas_F = divide_up(most, parts_F).clamp(min=least)
    means_S = (2 * contexts_S + counts_S) // (2 * tile)
    parts_SF = divide_up(means_S[:, None], quotas_F).clamp(min=1)
    entries_F = (blocks_S[:, None] * parts_SF).sum(0)
    stored_F = (blocks_S[:, None] * parts_SF * (parts_SF > 1)).sum(0)
    work, merging_F = 4 * (blocks_S * means_S).sum(), 12 + 2 * parts_F

    def ends(entries: Tensor, stored: Tensor, in_last: Tensor, last: Tensor) -> Tensor:
        idle = divide_up(in_last * num_kv_heads, width) * width - in_last * num_kv_heads
        return (work + 4 * entries + 4 * stored) * num_kv_heads // width + last * idle // width

    last_F = 4 * quotas_F.clamp(max=shortest) + 4
    costs_F = torch.maximum(4 * quotas_F + 4, ends(entries_F, stored_F, entries_F, last_F))
    costs_F += merging_F * (parts_F > 1)
    fits_F = (parts_F == 1) | (2 * stored_F <= num_places)

    num_blocks = int(blocks_S.sum())
    num_left = num_blocks - num_blocks * num_kv_heads // width * width // num_kv_heads
    stored_F = num_left * parts_F
    last_F = 4 * divide_up(shortest, parts_F) + 8
    left_costs_F = ends(num_blocks - num_left + stored_F, stored_F, stored_F, last_F).clamp(min=4 * most + 4)
    left_costs_F += merging_F
    left_fits_F = (parts_F > 1) & (parts_F * least <= shortest) & (stored_F <= num_places)
    if num_left in {0, num_blocks}:
        left_fits_F[:] = False
    both = torch.where(torch.cat((fits_F, left_fits_F)), torch.cat((costs_F, left_costs_F)), 2**24)
    best = int((both * 2 * MOST_PARTS + torch.arange(2 * MOST_PARTS, device=both.device)).argmin())
    return Cut(int(quotas_F[best])) if best < MOST_PARTS else Cut(most, num_left, best - MOST_PARTS + 1)


def divide_up(number: Tensor | int, by: Tensor | int) -> Tensor:
    """How many of `by` it takes to hold the number."""
    return (number + by - 1) // by  # type: ignore[return-value]


@triton.jit
def find_cut(
    blocks,
    contexts,
    counts,
    most,
    shortest,
    num_places,
    num_multiprocessors,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The most tiles of a part; how many blocks at the end are cut alone, and into how many parts.

    Either all blocks are cut by the same quota, from 1 to `PARTS` parts of the longest one, or whole waves stay whole
    and what is left over is cut. Chunks count with their means. Costs are quarters of the time that a tile takes. A
    multiprocessor runs a program at a time. All end together, but for what the last wave leaves idle for as long as its
    programs take; these are taken to be the first rows of the chunk listed last, which see `shortest` tiles. To start a
    program and to store a part take as long as a tile, to merge three, and half a tile a part.
    """
    parts = 1 + tl.arange(0, PARTS)
    quotas = tl.maximum((most + parts - 1) // parts, LEAST)
    means = (2 * contexts + counts) // (2 * TILE)
    cuts = tl.maximum((means[:, None] + quotas[None, :] - 1) // quotas[None, :], 1)
    entries = tl.sum(blocks[:, None] * cuts, 0)
    stored = tl.sum(tl.where(cuts > 1, blocks[:, None] * cuts, 0), 0)
    work, merging = 4 * tl.sum(blocks * means, 0), 12 + 2 * parts

    last = 4 * tl.minimum(quotas, shortest) + 4
    ends = _ends(work, entries, stored, entries, last, num_multiprocessors, NUM_KV_HEADS)
    costs = tl.maximum(4 * quotas + 4, ends) + tl.where(parts > 1, merging, 0)
    costs = tl.where((parts == 1) | (2 * stored <= num_places), costs, 1 << 24)

    num_blocks = tl.sum(blocks, 0)
    num_left = num_blocks - num_blocks * NUM_KV_HEADS // num_multiprocessors * num_multiprocessors // NUM_KV_HEADS
    stored = num_left * parts
    last = 4 * ((shortest + parts - 1) // parts) + 8
    ends = _ends(work, num_blocks - num_left + stored, stored, stored, last, num_multiprocessors, NUM_KV_HEADS)
    left_costs = tl.maximum(4 * most + 4, ends) + merging
    fits = (parts > 1) & (parts * LEAST <= shortest) & (stored <= num_places)
    left_costs = tl.where(fits & (num_left > 0) & (num_left < num_blocks), left_costs, 1 << 24)

    best = tl.min(costs * 2 * PARTS + parts - 1, 0)
    best_left = tl.min(left_costs * 2 * PARTS + PARTS + parts - 1, 0)
    of_all, of_left = best % PARTS + 1, best_left % PARTS + 1
    is_left = best_left < best
    quota = tl.where(is_left, most, tl.maximum((most + of_all - 1) // of_all, LEAST))
    return quota, tl.where(is_left, num_left, 0), tl.where(is_left, of_left, 1)


@triton.jit
def _ends(work, entries, stored, in_last, last, num_multiprocessors, NUM_KV_HEADS: tl.constexpr):
    """When programs end that are spread evenly, and what `in_last` of them, the last ones, leave idle at the end."""
    waves = (in_last * NUM_KV_HEADS + num_multiprocessors - 1) // num_multiprocessors
    idle = waves * num_multiprocessors - in_last * NUM_KV_HEADS
    load = (work + 4 * entries + 4 * stored) * NUM_KV_HEADS // num_multiprocessors
    return load + last * idle // num_multiprocessors
