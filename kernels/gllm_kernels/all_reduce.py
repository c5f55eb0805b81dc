"""Sum of one tensor per GPU over NVLink, for the sizes of a decoding step, where NCCL's own latency would decide.

Every rank has a buffer that all ranks of the group can read and write (torch calls it symmetric memory). A rank puts
its tensor there, waits until all have, and sums everyone's, each element in float32 in the order of ranks: all ranks
get the same bits, which matters where they choose experts or tokens by them.

    one shot    every rank sums everything                    (W - 1) * N bytes over each link, one meeting
    two shots   every rank sums 1/W, then they swap the sums  2 * (W - 1) / W * N bytes, two meetings

Program p of every rank handles the same elements, in a slot of the buffer that only the p-th programs use, so they
meet among themselves and no meeting is one of whole grids. A slot has two halves, used in turn. That is enough: a
rank overwrites a half in the second call after the one that filled it; before, in the call between, it met every
peer's program, which that peer started after it had finished the earlier call, all its reads included. Which half is
next is counted in device memory, one count per program, so replayed CUDA graphs go on where the last replay ended;
meetings compare counts, which only grow, so nothing is ever reset.

It relies on what a tensor-parallel stage does anyway: all ranks make the same calls in the same order, one after the
other on one stream. A sum that also adds the residual and normalises would take the place of the last store.

Shapes: N elements, W ranks, P programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.jit import next_power_of_2, tl, triton

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_RANKS = 8
MAX_PROGRAMS = 64  # all must run at once, beside whatever else does: half of the multiprocessors
SLOT_BYTES = 1 << 17  # of one program's part of a tensor at most
SECOND_MEETING_BYTES = 640 << 10  # what a link carries while the ranks meet once more; beyond it, two shots win
VECTOR_BYTES = 16
NUM_WARPS = 16
TILE_BYTES, LARGE_TILE_BYTES = 1 << 13, 1 << 15  # one or four vectors a thread
MAX_REGISTERS = 64  # left alone, the compiler spills some to run more programs beside each other
FLAG_BYTES = 2 * MAX_PROGRAMS * MAX_RANKS * 8
BUFFER_BYTES = FLAG_BYTES + 2 * MAX_PROGRAMS * SLOT_BYTES
"""Of each rank's buffer: who arrived at which meeting, then the slots. It must be zero at first."""

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


class Peers(NamedTuple):
    """One rank's view of the buffers of its group."""

    addresses_W: Tensor  # int64: where each rank's buffer begins, as this device sees it; multiples of 16
    counts_P: Tensor  # int64, MAX_PROGRAMS of them, zero at first: calls so far
    rank: int

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.addresses_W.numel()


def make_peers(addresses: Sequence[int], rank: int, device: torch.device) -> Peers:
    """The peers whose buffers lie at these addresses; theirs may still be in use by nobody.

    Raises:
        ValueError: more ranks than the buffers have room for, or a buffer that is not aligned.
    """
    if not 1 < len(addresses) <= MAX_RANKS or any(address % VECTOR_BYTES for address in addresses):
        raise ValueError(
            f"buffers of 2 to {MAX_RANKS} ranks at multiples of {VECTOR_BYTES} are needed, not {list(addresses)}"
        )
    return Peers(
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.zeros(MAX_PROGRAMS, dtype=torch.int64, device=device),
        rank,
    )


class _Layout(NamedTuple):
    """How a tensor is spread over programs: each has rows of tiles that follow each other."""

    num_programs: int
    rows_per_program: int
    row_tiles: int  # 1 in one shot; in two, one for each rank to sum
    tile_bytes: int


def _layout(num_bytes: int, num_ranks: int, row_tiles: int | None = None) -> _Layout:
    if row_tiles is None:
        saved_bytes = num_bytes * (num_ranks - 1) * (num_ranks - 2) // num_ranks
        row_tiles = num_ranks if saved_bytes > SECOND_MEETING_BYTES else 1
    is_large = row_tiles == 1 and num_bytes > MAX_PROGRAMS * TILE_BYTES
    tile_bytes = LARGE_TILE_BYTES if is_large else TILE_BYTES
    rows = -(-num_bytes // (row_tiles * tile_bytes))
    rows_per_program = -(-rows // MAX_PROGRAMS)
    return _Layout(-(-rows // rows_per_program), rows_per_program, row_tiles, tile_bytes)


def takes(x_N: Tensor, num_ranks: int) -> bool:
    """Whether `all_reduce` can sum such a tensor; like tensors get the same answer on all ranks."""
    num_bytes = x_N.nbytes
    if not 0 < num_bytes <= MAX_PROGRAMS * SLOT_BYTES or num_bytes % VECTOR_BYTES or x_N.dtype not in _DTYPES:
        return False
    _, rows_per_program, row_tiles, tile_bytes = _layout(num_bytes, num_ranks)
    fits = rows_per_program * row_tiles * tile_bytes <= SLOT_BYTES
    return fits and x_N.data_ptr() % VECTOR_BYTES == 0 and x_N.is_contiguous()


def all_reduce(x_N: Tensor, peers: Peers) -> Tensor:
    """Sum of everyone's tensor, in place; of any shape.

    Raises:
        ValueError: `takes` says no.
    """
    if not takes(x_N, peers.num_ranks):
        raise ValueError(
            f"a tensor to sum must be contiguous, float32, bfloat16 or float16, a multiple of {VECTOR_BYTES} bytes and "
            f"at most about {MAX_PROGRAMS * SLOT_BYTES}, not {tuple(x_N.shape)} with strides {x_N.stride()} of "
            f"{x_N.dtype}"
        )
    return all_reduce_triton(x_N, peers)


def all_reduce_reference(everyones_N: Sequence[Tensor]) -> Tensor:
    """What every rank gets: the sum in float32, in the order of ranks, rounded once."""
    total_N = everyones_N[0].float()
    for x_N in everyones_N[1:]:
        total_N += x_N.float()
    return total_N.to(everyones_N[0].dtype)


def all_reduce_triton(x_N: Tensor, peers: Peers, *, row_tiles: int | None = None) -> Tensor:
    """The kernel; `row_tiles` is 1 for one shot, W for two (default: by size)."""
    addresses_W, counts_P, rank = peers
    num_ranks, num_bytes, itemsize = addresses_W.numel(), x_N.nbytes, x_N.element_size()
    num_programs, rows_per_program, row_tiles, tile_bytes = _layout(num_bytes, num_ranks, row_tiles)
    _all_reduce_kernel[(num_programs,)](
        x_N,
        addresses_W,
        counts_P,
        num_bytes // VECTOR_BYTES,
        rows_per_program,
        rank,
        NUM_RANKS=num_ranks,
        LANES=next_power_of_2(num_ranks),
        ROW_TILES=row_tiles,
        TILE=tile_bytes // itemsize,
        VECTOR=VECTOR_BYTES // itemsize,
        SLOT=SLOT_BYTES // itemsize,
        SLOTS=MAX_PROGRAMS,
        FLAGS=FLAG_BYTES,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )
    return x_N


@triton.jit(do_not_specialize=["num_vectors", "rows_per_program", "rank"])
def _all_reduce_kernel(
    x_N,
    addresses_W,
    counts_P,
    num_vectors,
    rows_per_program,
    rank,
    NUM_RANKS: tl.constexpr,
    LANES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """A program sums `rows_per_program` rows of ROW_TILES tiles each, which follow each other.

    What a row loads is loaded before any of it is stored: links are long. Counts of vectors, not of elements, let
    the compiler see that a vector is masked as a whole.
    """
    program = tl.program_id(0)
    count = tl.load(counts_P + program) + 1
    first = program * rows_per_program * (ROW_TILES * TILE)
    mine_N, last = x_N + first, num_vectors * VECTOR - first  # this program's elements, were the last ones there
    slot = ((count % 2) * SLOTS + program) * SLOT
    own = _buffer(addresses_W + rank, x_N, FLAGS) + slot
    peers = ()
    for peer in tl.static_range(NUM_RANKS):
        peers = peers + (_buffer(addresses_W + peer, x_N, FLAGS) + slot,)  # type: ignore[assignment] # noqa: RUF005

    _put(mine_N, own, rows_per_program, last, ROW_TILES, TILE)
    _meet(addresses_W, program, count, rank, NUM_RANKS, LANES)
    # With two shots over this rank's own terms, which nobody else reads.
    target = mine_N if ROW_TILES == 1 else own
    _sum(peers, target, rows_per_program, rank % ROW_TILES, last, NUM_RANKS, ROW_TILES, TILE)
    if ROW_TILES > 1:
        _meet(addresses_W, SLOTS + program, count, rank, NUM_RANKS, LANES)
        _take(peers, mine_N, rows_per_program, last, NUM_RANKS, TILE)
    tl.store(counts_P + program, count)


@triton.jit
def _put(mine_N, own, num_rows, last, ROW_TILES: tl.constexpr, TILE: tl.constexpr):
    """Copy a program's elements into its slot."""
    row = 0
    while row < num_rows:
        at = row * (ROW_TILES * TILE) + tl.arange(0, TILE)
        loaded = ()
        for part in tl.static_range(ROW_TILES):
            tile = tl.load(mine_N + at + part * TILE, mask=at + part * TILE < last)
            loaded = loaded + (tile,)  # type: ignore[assignment] # noqa: RUF005
        for part in tl.static_range(ROW_TILES):
            tl.store(own + at + part * TILE, loaded[part], mask=at + part * TILE < last)
        row += 1


@triton.jit
def _sum(peers, target, num_rows, part, last, NUM_RANKS: tl.constexpr, ROW_TILES: tl.constexpr, TILE: tl.constexpr):
    """Sum everyone's tile `part` of each row."""
    row = 0
    while row < num_rows:
        at = (row * ROW_TILES + part) * TILE + tl.arange(0, TILE)
        total = tl.load(peers[0] + at, mask=at < last, other=0.0).to(tl.float32)
        for peer in tl.static_range(1, NUM_RANKS):
            total += tl.load(peers[peer] + at, mask=at < last, other=0.0).to(tl.float32)
        tl.store(target + at, total.to(target.dtype.element_ty), mask=at < last)
        row += 1


@triton.jit
def _take(peers, mine_N, num_rows, last, NUM_RANKS: tl.constexpr, TILE: tl.constexpr):
    """Copy each rank's sums out of its slot."""
    row = 0
    while row < num_rows:
        at = row * (NUM_RANKS * TILE) + tl.arange(0, TILE)
        loaded = ()
        for peer in tl.static_range(NUM_RANKS):
            tile = tl.load(peers[peer] + at + peer * TILE, mask=at + peer * TILE < last)
            loaded = loaded + (tile,)  # type: ignore[assignment] # noqa: RUF005
        for peer in tl.static_range(NUM_RANKS):
            tl.store(mine_N + at + peer * TILE, loaded[peer], mask=at + peer * TILE < last)
        row += 1


@triton.jit
def _buffer(address, like, FLAGS: tl.constexpr):
    """Where a rank's slots begin, as a pointer of `like`'s type."""
    return tl.multiple_of((tl.load(address) + FLAGS).to(like.dtype), 16)


@triton.jit
def _meet(addresses_W, place, count, rank, NUM_RANKS: tl.constexpr, LANES: tl.constexpr):
    """Wait until every rank's program is at this place for the `count`th time; what they wrote before is seen after.

    A flag holds how often its writer was there. A program's threads write; the barrier orders that before one of
    them releases, and the other way round at the end.
    """
    lane = tl.arange(0, LANES)
    is_rank = lane < NUM_RANKS
    pointer_type: tl.constexpr = tl.pointer_type(tl.int64)
    theirs = tl.load(addresses_W + lane, mask=is_rank, other=0).to(pointer_type) + place * NUM_RANKS + rank
    ours = tl.load(addresses_W + rank).to(pointer_type) + place * NUM_RANKS + lane
    tl.debug_barrier()
    tl.atomic_xchg(theirs, count, mask=is_rank, sem="release", scope="sys")
    while tl.min(tl.where(is_rank, tl.atomic_add(ours, 0, mask=is_rank, sem="acquire", scope="sys"), count)) < count:
        pass
    tl.debug_barrier()
