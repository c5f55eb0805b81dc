"""Both ways from stage to stage on two GPUs: values, order, memory that is used again, processes that end meanwhile.

`pytest -m gpu tests/runtime/test_gpu_edges.py`; benchmarks/edges.py has the times.
"""

import os
import random
import signal
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from runtime.ranks import on_processes
from runtime.servers import free_port

from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.runtime.worker.groups import connect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

BACKEND = "cpu:gloo,cuda:nccl"
HIDDEN = 1024
MAX_ROWS = 700  # of what a slot holds; a few tensors are larger
MAX_IN_FLIGHT = 3
NUM_SENDS = 1000
NAP = 300_000  # cycles


def _connect(rank, kind):
    device = torch.device("cuda", rank)
    largest_bytes = MAX_ROWS * HIDDEN * 2 if kind == "copy" else 0
    shape = load_shape("qwen3-0.6b")
    _, neighbours = connect(Parallel(pp=2), shape, rank, device, MAX_IN_FLIGHT, largest_bytes=largest_bytes)
    used = neighbours.after if rank == 0 else neighbours.before
    for edge in (used, neighbours.tokens):
        assert (edge.method == "copy") == (kind == "copy"), edge.method
    return device, neighbours


def _numbers(number, size, device):
    """Integers that bfloat16 holds, others than those of the tensors before and after."""
    return ((torch.arange(size[0] * size[1], device=device) + 31 * number) % 251).to(torch.bfloat16).view(size)


def _pipeline(rank, kind):
    """Steps as stages take them: hidden states one way, tokens back, at most so many on the road; all random."""
    device, neighbours = _connect(rank, kind)
    shared, own = random.Random(0), random.Random(rank + 1)
    sizes = [(shared.choice([1, 7, shared.randint(1, MAX_ROWS), MAX_ROWS]), HIDDEN) for _ in range(NUM_SENDS)]
    sizes[::97] = [(MAX_ROWS + number, HIDDEN) for number in range(1, 1 + len(sizes[::97]))]  # not for a slot
    busy = torch.randn(2048, 2048, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def take_tokens(number):
        count = _num_tokens(sizes[number])
        tokens = neighbours.tokens.receive(torch.full((count,), -1, device=device))
        return tokens.ne(torch.arange(count, device=device) + number).sum()

    for number, size in enumerate(sizes):
        if own.random() < 0.2:
            torch.cuda._sleep(own.randint(1, 10) * NAP)
        if own.random() < 0.3:
            torch.cuda.current_stream().synchronize()  # else the host may be far ahead
        if rank == 0:
            if number >= MAX_IN_FLIGHT:
                wrong += take_tokens(number - MAX_IN_FLIGHT)
            busy = torch.nn.functional.normalize(busy @ busy)
            neighbours.after.send(_numbers(number, size, device))  # nobody else holds it: its memory is used again
        else:
            hidden = neighbours.before.receive(torch.full(size, -1.0, dtype=torch.bfloat16, device=device))
            busy = torch.nn.functional.normalize(busy @ busy)
            wrong += hidden.ne(_numbers(number, size, device)).sum()
            neighbours.tokens.send(torch.arange(_num_tokens(size), device=device) + number)
    if rank == 0:
        for number in range(NUM_SENDS - MAX_IN_FLIGHT, NUM_SENDS):
            wrong += take_tokens(number)
    torch.cuda.synchronize()
    assert bool(busy.isfinite().all())
    _send_once_more(rank, neighbours, device)
    return int(wrong)


def _num_tokens(size):
    return size[0] % 50 + 1


def _send_once_more(rank, neighbours, device):
    """What was sent before is let go."""
    if rank == 0:
        neighbours.after.send(torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=device))
        assert len(neighbours.after._sent) <= 1
        assert len(neighbours.after._copied) <= 1
    else:
        neighbours.before.receive(torch.empty(1, HIDDEN, dtype=torch.bfloat16, device=device))
    torch.cuda.synchronize()
    dist.barrier()


@pytest.mark.parametrize("kind", ["nccl", "copy"])
def test_a_thousand_tensors_arrive_as_they_were_sent(kind):
    assert on_processes(partial(_pipeline, kind=kind), 2, backend=BACKEND, timeout_s=200) == [0, 0]


def _tokens_that_nobody_feeds_in(rank, kind):
    """The first stage takes tokens only when they are `MAX_IN_FLIGHT` steps old, as after answers of one token."""
    device, neighbours = _connect(rank, kind)
    for number in range(40):
        if rank == 0:
            if number >= MAX_IN_FLIGHT:
                neighbours.tokens.receive(torch.empty(1, dtype=torch.int64, device=device))
            neighbours.after.send(torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=device))
        else:
            neighbours.before.receive(torch.empty(1, HIDDEN, dtype=torch.bfloat16, device=device))
            neighbours.tokens.send(torch.full((1,), number, device=device))
            torch.cuda.synchronize()  # the engine has its result, though its tokens wait in the ring
    torch.cuda.synchronize()
    dist.barrier()


def test_tokens_that_nobody_feeds_in_hold_up_no_step():
    on_processes(partial(_tokens_that_nobody_feeds_in, kind="copy"), 2, backend=BACKEND)


def _wait_for_ever(rank, port, ends_itself, told):
    """The receiver's stream waits for what is never sent; then its process ends, one way or the other."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group(BACKEND, rank=rank, world_size=2)
    device, neighbours = _connect(rank, "copy")
    if rank == 1:
        neighbours.before.receive(torch.empty(8, HIDDEN, dtype=torch.bfloat16, device=device))
        assert not torch.cuda.current_stream().query(), "it waits"
        # A send behind it waits too, and so does what would copy it.
        neighbours.tokens.send(torch.zeros(1, dtype=torch.int64, device=device))
    told.put(rank)
    if ends_itself:
        del neighbours  # as a worker's function that returns: no destructor may wait for the GPU
        told.put(rank)
        told.close()
        told.join_thread()
        os._exit(0)
    time.sleep(300)


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_process_whose_stream_waits_ends_at_once(ends_itself):
    context = get_context("spawn")
    told, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_wait_for_ever, args=(rank, port, ends_itself, told), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        for _ in range(4 if ends_itself else 2):
            told.get(timeout=120)
        if not ends_itself:
            for process in ranks:
                os.kill(process.pid, signal.SIGTERM)
        for process in ranks:
            process.join(20)
            assert process.exitcode == (0 if ends_itself else -signal.SIGTERM)
    finally:
        for process in ranks:
            process.kill()
