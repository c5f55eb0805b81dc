"""Some processes that find each other through torch.distributed."""

import os
import socket
import traceback
from multiprocessing import get_context

import torch
import torch.distributed as dist


def on_processes(function, num_ranks, *, backend="gloo", timeout_s=120):
    """Call function(rank) in a process for each rank; what they return, in order. None is left behind."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = get_context("spawn")
    found = context.Queue()
    processes = [
        context.Process(target=_rank, args=(function, rank, num_ranks, (backend, port), found), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        results = {}
        for _ in processes:
            rank, result, error = found.get(timeout=timeout_s)
            assert error is None, error
            results[rank] = result
        return [results[rank] for rank in range(num_ranks)]
    finally:
        for process in processes:
            process.join(10 if len(results) == num_ranks else 1)
            process.kill()


def _rank(function, rank, num_ranks, meeting, found):
    backend, port = meeting
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=num_ranks)
        result = function(rank)
    except BaseException:
        found.put((rank, None, traceback.format_exc()))
        raise
    found.put((rank, result, None))
    dist.barrier()
    dist.destroy_process_group()
