"""How long the attention of chunks of prompts takes: the schedule of its kernel, played.

The kernel (`gllm_kernels.chunk_plan` has its plan) deals out blocks of (query, head) rows, of which some are cut by
their keys into parts. Each is a program, and a multiprocessor runs one at a time: so a step takes as long as whole
waves of programs do, and its time is no sum over its chunks. Times are in tiles, of what a program takes for one tile
of keys. Workers say what the kernel is like, a profile holds it, and the simulator plays it.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Chunks = Sequence[tuple[int, int]]  # tokens before, tokens

MOST_PARTS = 32  # of a block, as `gllm_kernels.chunk_cut` has it
MOST_EACH = 16  # equal chunks of a step that is profiled: as many as fit, but no more

# In tiles, as profiled on an H200, where a tile takes 1.35 us.
_START, _STORE = 1.2, 1.1  # of a program; of a part that another program merges
_MERGE, _MERGE_EACH = 3.0, 0.5  # all parts of a block; for each of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkKernel:
    """What the kernel's plan depends on besides chunks."""

    rows: int  # (query, head) pairs of a block
    tile: int  # keys read at a time
    least_tiles: int  # of a part
    places: int  # for parts, of each KV head
    kv_heads: int  # of a rank
    group_size: int  # query heads per KV head
    multiprocessors: int


class Cut(NamedTuple):
    """How blocks are cut."""

    quota: int  # tiles of a part at most
    num_left: int = 0  # blocks at the end of the list that are cut alone
    parts_of_left: int = 1  # at most


def listed(chunks: Chunks) -> Chunks:
    """In the kernel's order: backwards where the last chunk has more keys before it than the first."""
    return chunks[::-1] if chunks[-1][0] > chunks[0][0] else chunks


def duration(kernel: ChunkKernel, chunks: Chunks) -> float:
    """How long chunks take together, in tiles."""
    # What all KV heads do alike so many multiprocessors do alike.
    alike = gcd(kernel.kv_heads, kernel.multiprocessors)
    return _end(_programs(kernel, listed(chunks)), kernel.kv_heads // alike, kernel.multiprocessors // alike)


def _end(programs: Sequence[float], copies: int, width: int) -> float:
    """When the last of these programs ends; each starts, copies at a time, where the first one ends."""
    programs = programs if copies == 1 else [each for each in programs for _ in range(copies)]
    ends = list(programs[:width])
    heapify(ends)
    for each in programs[width:]:
        heapreplace(ends, ends[0] + each)
    return max(ends)


def _programs(kernel: ChunkKernel, chunks: Chunks) -> list[float]:
    """What each program of a KV head takes, in the kernel's order."""
    cut = find_cut(kernel, chunks)
    if not cut.num_left and cut.quota >= _longest(kernel, chunks):
        return [_START + end for start, num_tokens in chunks for end in _ends_of_blocks(kernel, start, num_tokens)]
    found: list[float] = []
    blocks = _blocks(kernel, chunks)
    for (end, seen), num_parts in zip(blocks, parts_of_blocks(kernel, cut, [seen for _, seen in blocks]), strict=True):
        if num_parts == 1:
            found.append(_START + end)
            continue
        bounds = [seen * part // num_parts for part in range(num_parts)]
        found += [_START + _STORE + after - before for before, after in pairwise(bounds)]
        found.append(_START + _STORE + end - bounds[-1] + _MERGE + _MERGE_EACH * num_parts)
    return found


def _longest(kernel: ChunkKernel, chunks: Chunks) -> int:
    return max(max([start + num_tokens for start, num_tokens in chunks]) // kernel.tile, 1)


def _ends_of_blocks(kernel: ChunkKernel, start: int, num_tokens: int) -> list[int]:
    """Tiles that each block of a chunk sees, the last rows first."""
    group, rows, tile = kernel.group_size, kernel.rows, kernel.tile
    first_rows = range((num_tokens * group - 1) // rows * rows, -1, -rows)
    above, most = start + tile, start + num_tokens + tile - 1
    last, *others = [(above + (first_row + rows - 1) // group) // tile for first_row in first_rows]
    return [min(last, most // tile), *others]


def _blocks(kernel: ChunkKernel, chunks: Chunks) -> list[tuple[int, int]]:
    """Of each block the tiles that its last row sees, and how many of them all its rows do: only these are dealt."""
    group, rows, tile, found = kernel.group_size, kernel.rows, kernel.tile, []
    for start, num_tokens in chunks:
        ends = _ends_of_blocks(kernel, start, num_tokens)
        first_rows = range((len(ends) - 1) * rows, -1, -rows)
        found += [(end, (start + row // group + 1) // tile) for end, row in zip(ends, first_rows, strict=True)]
    return found


def parts_of_blocks(kernel: ChunkKernel, cut: Cut, seen: Sequence[int]) -> list[int]:
    """How many parts each block is cut into, by the tiles that all its rows see."""
    num_whole, quota, place, found = len(seen) - cut.num_left, cut.quota, 0, []
    for block, tiles in enumerate(seen):
        if block < num_whole:
            wanted = max(-(-tiles // quota), 1)
        else:
            wanted = max(min(tiles // kernel.least_tiles, cut.parts_of_left), 1)
        if wanted > 1:
            place += wanted
        found.append(wanted if place <= kernel.places else 1)  # one without a place stays whole
    return found


def find_cut(kernel: ChunkKernel, chunks: Chunks) -> Cut:
    """The kernel's choice: the least of its table of costs, where fewer parts go first, and what is left last."""
    most, load = _longest(kernel, chunks), _Load(kernel, listed(chunks))
    if most < 2 * kernel.least_tiles:
        return Cut(most)
    cut, cost = load.cheapest_of_all(most)
    return load.cheapest_of_left(most, cost) or cut


class _Load:
    """What the kernel knows of chunks when it chooses: their blocks and the mean of the tiles that these see.

    Costs are quarters of a tile. More parts cost more to start, store and merge: once that, with all work spread
    evenly, is no less than the best cost so far, no more are tried.
    """

    def __init__(self, kernel: ChunkKernel, chunks: Chunks) -> None:
        group, rows, tile = kernel.group_size, kernel.rows, kernel.tile
        self._kernel = kernel
        self._pairs = [(-(-num * group // rows), (2 * start + num) // (2 * tile)) for start, num in chunks]
        self._num_blocks = sum([blocks for blocks, _ in self._pairs])
        self._work = 4 * sum([blocks * mean for blocks, mean in self._pairs])
        self._shortest = chunks[-1][0] // tile + 1
        self._least = (self._work + 4 * self._num_blocks) * kernel.kv_heads // kernel.multiprocessors

    def cheapest_of_all(self, most: int) -> tuple[Cut, int]:
        """All blocks by the same quota; and what that costs."""
        pairs, num_blocks, shortest = self._pairs, self._num_blocks, self._shortest
        found, best = Cut(most), max(4 * most + 4, self._ends(num_blocks, 0, num_blocks, 4 * min(most, shortest) + 4))
        for parts, quota in _quotas(most, self._kernel.least_tiles):
            merging = 12 + 2 * parts
            if self._least + merging >= best:
                break
            stored = sum([blocks * -(-mean // quota) for blocks, mean in pairs if mean > quota])
            if 2 * stored > self._kernel.places:
                break
            entries = stored + sum([blocks for blocks, mean in pairs if mean <= quota])
            ends = self._ends(entries, stored, entries, 4 * min(quota, shortest) + 4)
            cost = max(4 * quota + 4, ends) + merging
            if cost < best:
                found, best = Cut(quota), cost
        return found, best

    def cheapest_of_left(self, most: int, best: int) -> Cut | None:
        """Those alone that whole waves leave over; None if there are none, or nothing is below the best cost so far."""
        kernel, num_blocks, shortest = self._kernel, self._num_blocks, self._shortest
        num_whole = num_blocks * kernel.kv_heads // kernel.multiprocessors * kernel.multiprocessors // kernel.kv_heads
        num_left = num_blocks - num_whole
        if not 0 < num_left < num_blocks:
            return None
        found, least = None, max(self._least, 4 * most + 4)
        for parts in range(2, min(MOST_PARTS, shortest // kernel.least_tiles, kernel.places // num_left) + 1):
            merging, stored = 12 + 2 * parts, num_left * parts
            if least + merging >= best:
                break
            ends = self._ends(num_whole + stored, stored, stored, 4 * -(-shortest // parts) + 8)
            cost = max(4 * most + 4, ends) + merging
            if cost < best:
                found, best = Cut(most, num_left, parts), cost
        return found

    def _ends(self, entries: int, stored: int, in_last: int, last: int) -> int:
        """When programs end that are spread evenly, and what `in_last` of them, the last ones, leave idle then."""
        heads, width = self._kernel.kv_heads, self._kernel.multiprocessors
        idle = -(in_last * heads) % width
        return (self._work + 4 * entries + 4 * stored) * heads // width + last * idle // width


def _quotas(most: int, least: int) -> Iterable[tuple[int, int]]:
    """Numbers of parts, from two, and the tiles of one; of those that come to the same the least number."""
    before = most
    for parts in range(2, MOST_PARTS + 1):
        quota = max(-(-most // parts), least)
        if quota < before:
            yield parts, quota
        before = quota
