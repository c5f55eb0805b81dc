"""The ranks of a stage over gloo: sums, tensors side by side, and why they share no memory."""

import pytest
import torch
import torch.distributed as dist
from runtime.ranks import on_processes

from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.runtime.worker import symmetric
from gllm.runtime.worker.groups import connect

NUM_RANKS = 2
CPU = torch.device("cpu")


def inputs(rank, *size):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def _on_the_cpu(rank):
    shard, _ = connect(Parallel(tp=NUM_RANKS), load_shape("qwen3-0.6b"), rank, CPU, 1)
    group = shard.group
    tensor = inputs(rank, 5, 7)
    summed = group.all_reduce(tensor)
    assert summed is tensor
    wide = [group.all_gather(inputs(rank, *size)) for size in ((3, 4), (1, 6), (0, 4), (2, 3, 5))]
    turned = group.all_gather(inputs(rank, 4, 3).t())
    assert all(each.is_contiguous() for each in wide)
    return group.method, summed.tolist(), [each.tolist() for each in wide], turned.tolist()


def test_sums_and_tensors_side_by_side():
    told = on_processes(_on_the_cpu, NUM_RANKS)
    both = [inputs(rank, 5, 7) for rank in range(NUM_RANKS)]
    wide = [torch.cat([inputs(rank, *size) for rank in range(2)], -1) for size in ((3, 4), (1, 6), (0, 4), (2, 3, 5))]
    turned = torch.cat([inputs(rank, 4, 3).t() for rank in range(2)], -1)
    expected = (both[0] + both[1]).tolist(), [each.tolist() for each in wide], turned.tolist()
    for method, *results in told:
        assert method == "process group (no GPU)"
        assert tuple(results) == expected


def _memory_that_fails(rank):
    """Every step works but one, which fails on one rank: what both say, and what the other went on to do."""
    group, told = dist.new_group([0, 1]), []
    steps = ["_check", "_check_reach", "_allocate", "_rendezvous", "_try_out"]
    for failing in (*steps, None):
        done = []
        for name in steps:

            def step(*_, name=name, failing=failing, done=done):
                if name == failing and rank == 1:
                    raise RuntimeError(f"{name} failed\nand more")
                done.append(name)
                return symmetric.MappedMemory([16, 32], None, None)

            setattr(symmetric, name, step)
        try:
            symmetric.share_memory(group, CPU)
            told.append(("works", done))
        except symmetric.NoSharedMemoryError as error:
            told.append((str(error), done))
    return told


def test_if_one_rank_cannot_share_its_memory_none_goes_on():
    well, failing = on_processes(_memory_that_fails, NUM_RANKS)
    assert [words for words, _ in well] == [words for words, _ in failing]
    assert [words for words, _ in well] == [
        "_check failed",
        "_check_reach failed",
        "_allocate failed",
        "_rendezvous failed",
        "_try_out failed",
        "works",
    ]
    assert [len(done) for _, done in well] == [1, 2, 3, 4, 5, 5]
    assert [len(done) for _, done in failing] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ([("one", 0), ("two", 1)], "several hosts"),
        ([("one", 0), ("one", 0)], "one GPU"),
    ],
)
def test_memory_out_of_reach(places, why):
    with pytest.raises(symmetric.NoSharedMemoryError, match=why):
        symmetric._check_reach(places, torch.device("cuda", 0))


def test_the_switch(monkeypatch):
    with pytest.raises(symmetric.NoSharedMemoryError, match="no GPU"):
        symmetric._check(None, CPU)
    monkeypatch.setenv(symmetric.SWITCH, "NCCL")
    with pytest.raises(symmetric.NoSharedMemoryError, match="GLLM_ALL_REDUCE=nccl"):
        symmetric._check(None, torch.device("cuda", 0))
