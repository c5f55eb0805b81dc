"""Sums over shared memory beside NCCL's, and edges that nobody waits for; on two or four GPUs.

`pytest -m gpu tests/runtime/test_gpu_all_reduce.py`; times go to $OUT/all_reduce.json, a JSON object a line.
"""

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gllm_kernels.all_reduce import all_reduce_reference, all_reduce_triton
from runtime.ranks import on_processes

from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.runtime.worker.groups import connect

NUM_GPUS = torch.cuda.device_count()
NUM_RANKS = 4 if NUM_GPUS >= 4 else 2
BACKEND = "cpu:gloo,cuda:nccl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs"),
]

KIB = 1 << 10
SIZES = (16, 8 * KIB - 16, 8 * KIB, 10 * KIB, 100 * KIB + 48, 640 * KIB, 1024 * KIB, 2560 * KIB, 4096 * KIB, 8192 * KIB)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMED = [KIB << power for power in range(3, 14)]  # 8 KiB to 8 MiB
CALLS, REPLAYS = 20, 50


def _communicator(rank):
    device = torch.device("cuda", rank)
    shard, _ = connect(Parallel(tp=NUM_RANKS), load_shape("qwen3-32b"), rank, device, 1)
    return shard.group, device


def _everyones(tensor):
    parts = [torch.empty_like(tensor) for _ in range(NUM_RANKS)]
    dist.all_gather(parts, tensor)
    return parts


def _assert_summed(summed, inputs):
    """All bits are the reference's, so all ranks have the same."""
    everyones = _everyones(inputs)
    assert torch.equal(summed, all_reduce_reference(everyones)), (summed.dtype, summed.nbytes)
    theirs = inputs.clone()
    dist.all_reduce(theirs)
    assert (summed.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm()


def _sums(rank):
    group, device = _communicator(rank)
    assert group.method == "shared memory", group.method
    torch.manual_seed(rank)
    cases = [(size, dtype) for size in SIZES for dtype in DTYPES] * 3
    random.Random(0).shuffle(cases)
    kept = []
    for number, (size, dtype) in enumerate(cases):
        inputs = torch.randn(size // dtype.itemsize, device=device).to(dtype)
        if number % NUM_RANKS == rank:
            torch.cuda._sleep(2_000_000)  # now this rank comes late, now another
        kept.append((inputs, group.all_reduce(inputs.clone())))
    for row_tiles in (1, NUM_RANKS):
        inputs = torch.randn(1 << 18, device=device).bfloat16()
        kept.append((inputs, all_reduce_triton(inputs.clone(), group.memory.peers, row_tiles=row_tiles)))
    for inputs, summed in kept:
        _assert_summed(summed, inputs)


def test_sums_have_the_same_bits_on_all_ranks():
    on_processes(_sums, NUM_RANKS, backend=BACKEND)


def _graphs(rank):
    group, device = _communicator(rank)
    torch.manual_seed(rank)
    # An odd number of sums: what a replay leaves behind differs from one to the next.
    inputs = [torch.zeros(size // 2, dtype=torch.bfloat16, device=device) for size in (10 * KIB, 1280 * KIB, 64 * KIB)]
    outputs = [torch.zeros_like(each) for each in inputs]

    def compute():
        for each, out in zip(inputs, outputs, strict=True):
            group.all_reduce(out.copy_(each))

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    for number in range(100):
        for each in inputs:
            each.copy_(torch.randn_like(each))
        if number % NUM_RANKS == rank:
            torch.cuda._sleep(500_000)
        graph.replay()
        if number % 3 == 0:  # and now and then a sum outside
            lone = torch.randn(4096, device=device)
            _assert_summed(group.all_reduce(lone.clone()), lone)
        if number % 10 == 9:
            for each, out in zip(inputs, outputs, strict=True):
                _assert_summed(out, each)


def test_sums_inside_a_graph_that_is_replayed():
    on_processes(_graphs, NUM_RANKS, backend=BACKEND)


def _microseconds(work):
    """Of one call, out of a graph of many."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            work()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) * 1000 / (CALLS * REPLAYS), 2)


def _times(rank):
    group, device = _communicator(rank)
    return [_time(size, group, device) for size in TIMED]


def _time(size, group, device):
    tensor, peers = torch.zeros(size // 2, dtype=torch.bfloat16, device=device), group.memory.peers
    return {
        "op": "all_reduce",
        "ranks": NUM_RANKS,
        "bytes": size,
        "nccl_us": _microseconds(lambda: dist.all_reduce(tensor, group=group.group)),
        "ours_us": _microseconds(lambda: group.all_reduce(tensor)),
        "one_shot_us": _microseconds(lambda: all_reduce_triton(tensor, peers, row_tiles=1)),
        "two_shots_us": _microseconds(lambda: all_reduce_triton(tensor, peers, row_tiles=NUM_RANKS)),
    }


def test_times():
    lines = on_processes(_times, NUM_RANKS, backend=BACKEND, timeout_s=240)[0]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    sys.stdout.write(text)
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "all_reduce.json").write_text(text, encoding="utf-8")
    small = lines[0]
    assert small["ours_us"] < small["nccl_us"]


def _edges(rank, largest_bytes):
    """Hidden states of changing sizes; the receiver computes on, and its memory is used again at once."""
    device, shape = torch.device("cuda", rank), load_shape("qwen3-32b")
    _, neighbours = connect(Parallel(pp=2), shape, rank, device, 3, largest_bytes=largest_bytes)
    lots = random.Random(0)
    sizes = [(lots.randint(1, 700), 5120) for _ in range(100)]
    busy = torch.randn(4096, 4096, device=device)
    kept = []
    for number, size in enumerate(sizes):
        if rank == 0:
            neighbours.after.send(torch.full(size, float(number), dtype=torch.bfloat16, device=device))
        else:
            busy = busy @ busy / 64
            target = torch.full(size, -1.0, dtype=torch.bfloat16, device=device)
            kept.append(neighbours.before.receive(target).eq(number).all())
    torch.cuda.synchronize()
    assert all(bool(each) for each in kept)
    if rank == 0:
        neighbours.after.send(torch.zeros(1, device=device))
        assert len(neighbours.after._sent) + len(neighbours.after._copied) <= 1, "what was sent is let go"
    else:
        neighbours.before.receive(torch.zeros(1, device=device))
    torch.cuda.synchronize()


@pytest.mark.parametrize("largest_bytes", [0, 8 << 20])  # all through NCCL, all through a ring
def test_edges(largest_bytes):
    on_processes(partial(_edges, largest_bytes=largest_bytes), 2, backend=BACKEND)
