"""How the keys of sequences with one query each are shared out among the programs of the decode kernel.

Flash-Decoding (Dao et al., 2023) splits long sequences so that few of them still fill a GPU; work is shared out here as
Stream-K (arXiv 2301.03598) does for matrix products. The keys of all sequences, cut into tiles, form one line. Each
worker takes an equal stretch of it, whatever sequences lie there; the K programs of one worker read the same keys, each
its own KV head. A sequence that lies within one stretch is finished where it is read. Of one that several workers read,
each leaves a partial result, and whoever comes last merges them.

Shapes: S sequences, K KV heads, W workers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.jit import next_power_of_2, num_multiprocessors, runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

PLANNED_WORKERS = 16  # whose stretches one program of the planning kernel finds
PLANNED_SEQUENCES = 64, 512  # that a program looks at, or the next power of two: each size takes time to compile


class Tuning(NamedTuple):
    """How the kernel runs; never what it computes."""

    tile: int  # keys read at a time, a power of two, at least 16
    num_warps: int
    num_stages: int  # of the pipeline that loads tiles; one is being computed
    programs_per_multiprocessor: int


class DecodePlan(NamedTuple):
    """How workers share a batch's keys: made once a step on the device, used by all layers one after another."""

    bounds_S: Tensor  # int32 [S + 1], the tile at which each sequence begins; an empty one has one tile, too
    spans_W2: Tensor  # int32, first and last sequence of each worker; the last comes before the first if it has none
    quota: Tensor  # int32 [1], tiles of each worker
    counters_SK: Tensor  # int32, how many partial results are there; zero between calls
    scratch: Tensor  # float32, room for two partial results of each worker and KV head, and a weight for each element
    tuning: Tuning
    for_later: bool = False  # a kernel that waits for all before it lies between the plan and its first use


@lru_cache
def default_tuning(group_size: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """What suits an H200: together, the tiles in flight on a multiprocessor should exceed 32 KB several times."""
    row_bytes = next_power_of_2(head_dim) * dtype.itemsize
    if dtype == torch.float32 or row_bytes > 256 or group_size > 16:
        return Tuning(tile=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
    return Tuning(tile=64, num_warps=4, num_stages=3, programs_per_multiprocessor=3)


def plan_decode(
    kv_lens_S: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_decodes_1: Tensor | None = None,
    tuning: Tuning | None = None,
    for_later: bool = False,
) -> DecodePlan:
    """Share out the keys of sequences with one query each. Nothing but S is decided on the host.

    Args:
        kv_lens_S: int32, keys of each sequence; may be 0.
        num_decodes_1: int32, how many of them there are; those after them get no part of the plan. None: all are.
        num_heads: query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: of keys and values.
        dtype: of the cache.
        tuning: instead of what suits these shapes.
        for_later: a kernel that waits for all before it, as norms and products do, will lie between this and the first
            attention; that may then start early.

    Raises:
        ValueError: no sequences, or lengths of another type.
    """
    if kv_lens_S.dtype != torch.int32 or kv_lens_S.ndim != 1 or not len(kv_lens_S) or not kv_lens_S.is_contiguous():
        raise ValueError(f"plan_decode needs contiguous int32 lengths [S], not {kv_lens_S.dtype} {kv_lens_S.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    plan = _empty_plan(kv_lens_S, num_heads, num_kv_heads, head_dim, dtype, tuning)
    if num_decodes_1 is None:
        num_decodes_1 = torch.full((1,), len(kv_lens_S), dtype=torch.int32, device=kv_lens_S.device)
    (plan_triton if runs_triton(kv_lens_S) else plan_reference)(plan, kv_lens_S, num_decodes_1)
    return plan._replace(for_later=for_later)


def _empty_plan(
    kv_lens_S: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, tuning: Tuning | None
) -> DecodePlan:
    device, num_sequences = kv_lens_S.device, len(kv_lens_S)
    tuning = tuning or default_tuning(num_heads // num_kv_heads, head_dim, dtype)
    num_workers = max(1, num_multiprocessors(device) * tuning.programs_per_multiprocessor // num_kv_heads)
    sizes = (num_sequences + 1, 2 * num_workers, 1, num_sequences * num_kv_heads)
    bounds_S, spans, quota, counters = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    scratch = torch.empty(2 * num_workers * num_heads * 2 * head_dim, dtype=torch.float32, device=device)
    return DecodePlan(bounds_S, spans.view(-1, 2), quota, counters.view(-1, num_kv_heads), scratch, tuning)


def plan_reference(plan: DecodePlan, kv_lens_S: Tensor, num_decodes_1: Tensor) -> None:
    """Plain torch, written into the plan's tensors."""
    num_workers, num_decodes = len(plan.spans_W2), int(num_decodes_1)
    tiles_S = (kv_lens_S + (plan.tuning.tile - 1)).div(plan.tuning.tile, rounding_mode="floor").clamp(min=1)
    tiles_S[num_decodes:] = 0
    plan.bounds_S[0] = 0
    plan.bounds_S[1:] = tiles_S.cumsum(0)
    num_tiles = plan.bounds_S[-1:]
    least = (tiles_S.max().float().sqrt() / 2).int()
    plan.quota.copy_(torch.maximum((num_tiles + (num_workers - 1)).div(num_workers, rounding_mode="floor"), least))
    starts_W = torch.arange(num_workers, device=kv_lens_S.device) * plan.quota
    ends_W = torch.minimum(starts_W + plan.quota, num_tiles)
    begins_S = plan.bounds_S[:num_decodes].long()
    plan.spans_W2[:, 0] = (torch.searchsorted(begins_S, starts_W, right=True) - 1).clamp(min=0)
    plan.spans_W2[:, 1] = torch.searchsorted(begins_S, ends_W - 1, right=True) - 1
    plan.spans_W2[:, 1].masked_fill_(starts_W >= ends_W, -1)
    plan.counters_SK.zero_()


def plan_triton(plan: DecodePlan, kv_lens_S: Tensor, num_decodes_1: Tensor) -> None:
    """The same in one launch; its programs each add up all lengths."""
    num_workers, num_sequences = len(plan.spans_W2), len(kv_lens_S)
    _plan_kernel[(-(-num_workers // PLANNED_WORKERS),)](
        kv_lens_S,
        num_decodes_1,
        plan.bounds_S,
        plan.spans_W2,
        plan.quota,
        plan.counters_SK,
        num_sequences,
        num_workers,
        plan.counters_SK.numel(),
        TILE=plan.tuning.tile,
        SEQUENCES=planned_sequences(num_sequences),
        WORKERS=PLANNED_WORKERS,
    )


def planned_sequences(num_sequences: int) -> int:
    """How many a program of a planning kernel looks at."""
    return next((size for size in PLANNED_SEQUENCES if num_sequences <= size), next_power_of_2(num_sequences))


@triton.jit(
    do_not_specialize=["num_sequences", "num_workers", "num_counters"],
    do_not_specialize_on_alignment=[
        "kv_lens_ptr",
        "num_decodes_ptr",
        "bounds_ptr",
        "spans_ptr",
        "quota_ptr",
        "counters_ptr",
    ],
)
def _plan_kernel(
    kv_lens_ptr,
    num_decodes_ptr,
    bounds_ptr,
    spans_ptr,
    quota_ptr,
    counters_ptr,
    num_sequences,
    num_workers,
    num_counters,
    TILE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WORKERS: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    sequence = tl.arange(0, SEQUENCES)
    held, num_decodes = sequence < num_sequences, tl.load(num_decodes_ptr)
    real = sequence < num_decodes
    kv_lens = tl.load(kv_lens_ptr + sequence, mask=real, other=0)
    tiles = tl.where(real, tl.maximum((kv_lens + TILE - 1) // TILE, 1), 0)
    ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    # Few long sequences: a stretch takes as long to read as the parts of the longest take to merge.
    least = (tl.sqrt_rn(tl.max(tiles, 0).to(tl.float32)) / 2).to(tl.int32)
    quota = tl.maximum((num_tiles + num_workers - 1) // num_workers, least)
    if program == 0:
        tl.store(bounds_ptr + sequence, ends - tiles, mask=held)
        tl.store(bounds_ptr + num_sequences, num_tiles)
        tl.store(quota_ptr, quota)
    worker = program * WORKERS + tl.arange(0, WORKERS)
    start = worker * quota
    end = tl.minimum(start + quota, num_tiles)
    # A sequence that ends at or before a tile lies wholly before it.
    first = tl.sum((real[None, :] & (ends[None, :] <= start[:, None])).to(tl.int32), 1)
    last = tl.sum((real[None, :] & (ends[None, :] <= end[:, None] - 1)).to(tl.int32), 1)
    first = tl.maximum(tl.minimum(first, num_decodes - 1), 0)
    last = tl.where(start < end, last, -1)
    tl.store(spans_ptr + worker * 2, first, mask=worker < num_workers)
    tl.store(spans_ptr + worker * 2 + 1, last, mask=worker < num_workers)
    for at in range(program * SEQUENCES, num_counters, num_programs * SEQUENCES):
        tl.store(counters_ptr + at + sequence, 0, mask=at + sequence < num_counters)
