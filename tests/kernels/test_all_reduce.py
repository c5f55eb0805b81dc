"""Ranks as processes over shared memory, their kernels in Triton's interpreter: its atomics are real ones.

tests/runtime/test_gpu_all_reduce.py holds the same on GPUs.
"""

import itertools
import time
import traceback
from multiprocessing import get_context

import pytest
import torch
from gllm_kernels import all_reduce as module
from gllm_kernels.all_reduce import (
    BUFFER_BYTES,
    MAX_PROGRAMS,
    SLOT_BYTES,
    all_reduce,
    all_reduce_reference,
    all_reduce_triton,
    make_peers,
    takes,
)

NUM_PROGRAMS = 3  # so that small tensors make programs loop, and the last one's part is ragged
TILE = 8192  # bytes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (16, TILE - 16, TILE + 32, 5 * TILE, 7 * TILE + 16)  # bytes


def _inputs(seed, num_ranks, num_bytes, dtype):
    generator = torch.Generator().manual_seed(seed)
    numel = num_bytes // dtype.itemsize
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(num_ranks)]


def _dawdle(meet):
    """Now and then read late, when the others have long gone on to their next sum."""
    calls = itertools.count()

    def meet_and_sleep(*args):
        meet(*args)
        if next(calls) % 3 == 0:
            time.sleep(0.05)

    return meet_and_sleep


def _rank(rank, num_ranks, buffers, found):
    try:
        torch.set_num_threads(1)
        module.MAX_PROGRAMS = NUM_PROGRAMS
        if rank:
            module._meet = _dawdle(module._meet)
        peers = make_peers([buffer.data_ptr() for buffer in buffers], rank, torch.device("cpu"))
        sums = []
        for seed, size in enumerate(SIZES):
            for dtype in DTYPES:
                for row_tiles in (1, num_ranks):
                    tensor = _inputs(seed, num_ranks, size, dtype)[rank]
                    assert all_reduce_triton(tensor, peers, row_tiles=row_tiles) is tensor
                    sums.append(tensor.view(torch.uint8).numpy().tobytes())
        found.put((rank, sums, peers.counts_P.tolist()))
    except BaseException:
        found.put((rank, traceback.format_exc(), None))
        raise


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_get_the_sum_in_the_order_of_ranks_bit_by_bit(num_ranks):
    context = get_context("spawn")
    buffers = [torch.zeros(BUFFER_BYTES, dtype=torch.uint8).share_memory_() for _ in range(num_ranks)]
    found = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, buffers, found), daemon=True) for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        results = {}
        for _ in ranks:
            rank, sums, counts = found.get(timeout=120)
            assert counts is not None, sums
            results[rank] = sums, counts
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    sums, counts = results[0]
    assert all(others == (sums, counts) for others in results.values()), "all ranks have the same bits"
    assert counts[0] == len(sums) > counts[1] > 0, "programs count for themselves"
    cases = [(seed, size, dtype) for seed, size in enumerate(SIZES) for dtype in DTYPES for _ in range(2)]
    for (seed, size, dtype), found_sum in zip(cases, sums, strict=True):
        expected = all_reduce_reference(_inputs(seed, num_ranks, size, dtype))
        actual = torch.frombuffer(bytearray(found_sum), dtype=dtype)
        if dtype is torch.bfloat16:  # which the interpreter truncates
            assert (actual - expected).float().norm() / expected.float().norm() < 1e-2
        else:
            assert torch.equal(actual, expected)


def test_the_reference_rounds_once():
    everyones = _inputs(0, 4, 4096, torch.bfloat16)
    exact = torch.stack(everyones).double().sum(0)
    assert torch.equal(all_reduce_reference(everyones), exact.to(torch.bfloat16))


def _ones(num_bytes, dtype=torch.bfloat16):
    return torch.ones(num_bytes // dtype.itemsize, dtype=dtype)


def test_what_it_takes():
    largest = MAX_PROGRAMS * SLOT_BYTES
    assert takes(_ones(16), 2)
    assert all(takes(_ones(largest), num_ranks) for num_ranks in (2, 4, 8))
    assert not takes(_ones(largest + 16), 2)
    assert not takes(_ones(largest), 3), "rows of three tiles do not fill a slot"
    assert takes(_ones(largest // 2).view(-1, 64), 3)
    assert not takes(_ones(24), 2)
    assert not takes(_ones(0), 2)
    assert not takes(_ones(64, torch.int32), 2)
    assert not takes(_ones(64)[1:17], 2), "not aligned"
    assert not takes(_ones(512).view(16, 16)[:, :8], 2)


def test_errors():
    peers = make_peers([0, 16], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="contiguous"):
        all_reduce(torch.zeros(8, 8, dtype=torch.bfloat16).t()[:4], peers)
    with pytest.raises(ValueError, match=r"2 to 8 ranks"):
        make_peers([0], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"multiples of 16"):
        make_peers([0, 8], 0, torch.device("cpu"))
