"""Memory that some GPUs of a host all read and write, through torch's symmetric memory; never NVLink's multicast.

torch.distributed._symmetric_memory (alpha; as the documentation of torch 2.11 has it): every rank allocates the same
size, then `rendezvous` tells each where it sees the others' memory. torch's own one-shot and two-shot sums are not
used: they round after every addition, know no float16, and meet once more than gllm_kernels/all_reduce.py.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from gllm_kernels.all_reduce import BUFFER_BYTES, MAX_RANKS, Peers, all_reduce, make_peers
from gllm_kernels.jit import HAS_TRITON

if TYPE_CHECKING:
    from collections.abc import Callable

SWITCH = "GLLM_ALL_REDUCE"
"""Environment: "nccl" on any rank leaves every sum to the process group."""

SEVERAL_HOSTS = "ranks on several hosts"
"""Why ranks share no memory, where none could."""

_TRIED = (1 << 10, 1 << 20)  # elements: in one shot and, with more than two ranks, in two

_T = TypeVar("_T")


class SharedMemory(NamedTuple):
    """A stage's buffers as one rank sees them, and what must live as long as they do."""

    peers: Peers
    alive: tuple[object, ...] = ()


class MappedMemory(NamedTuple):
    """A buffer on each rank of a group, as one of them sees them."""

    addresses: list[int]  # of every rank's, on this device
    mine: torch.Tensor  # bytes, zero at first
    handle: object  # must live as long as anybody uses them


class NoSharedMemoryError(Exception):
    """The ranks share no memory; says why. Raised on all of them or on none."""


def share_memory(group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    """Connect the memory of all ranks of a group, who all call this.

    After each step that may fail on one rank alone they tell each other how it went, so that none goes on to wait
    for one that gave up.

    Raises:
        NoSharedMemoryError: some rank cannot.
    """
    together(group, lambda: _check(group, device))
    mapped = map_memory(group, device, BUFFER_BYTES)
    peers = together(group, lambda: make_peers(mapped.addresses, dist.get_rank(group), device))
    together(group, lambda: _try_out(peers, device))
    return SharedMemory(peers, mapped)


def map_memory(group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> MappedMemory:
    """So many bytes on each GPU of a group, zero at first, that all may read and write; all ranks call this.

    Raises:
        NoSharedMemoryError: some rank cannot.
    """
    places = _everyones(group, (socket.gethostname(), device.index))
    together(group, lambda: _check_reach(places, device))
    tensor = together(group, lambda: _allocate(group, device, num_bytes))
    return together(group, lambda: _rendezvous(group, tensor, device))


def _everyones(group: dist.ProcessGroup, mine: object) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    return told


def together(group: dist.ProcessGroup, step: Callable[[], _T]) -> _T:
    """Do it on every rank; if it fails on any, fail on all, with the first one's reason.

    Raises:
        NoSharedMemoryError: it failed somewhere.
    """
    result, why = None, ""
    try:
        result = step()
    except Exception as error:  # noqa: BLE001 - all is possible without; the reason is kept
        why = str(error) or type(error).__name__
    for told in _everyones(group, why):
        if told:
            raise NoSharedMemoryError(told.splitlines()[0])
    return result  # type: ignore[return-value] # it did not fail


def _check(group: dist.ProcessGroup, device: torch.device) -> None:
    if device.type != "cuda":
        raise NoSharedMemoryError("no GPU")
    if os.environ.get(SWITCH, "").lower() == "nccl":
        raise NoSharedMemoryError(f"{SWITCH}=nccl")
    if not HAS_TRITON:
        raise NoSharedMemoryError("triton is not installed")
    if dist.get_world_size(group) > MAX_RANKS:
        raise NoSharedMemoryError(f"more than {MAX_RANKS} ranks")


def _check_reach(places: list[tuple[str, int]], device: torch.device) -> None:
    """`places`: each rank's host and GPU."""
    if len({host for host, _ in places}) > 1:
        raise NoSharedMemoryError(SEVERAL_HOSTS)
    others = [index for _, index in places if index != device.index]
    if len(set(others)) < len(places) - 1:
        raise NoSharedMemoryError("two ranks on one GPU")
    if not all(torch.cuda.can_device_access_peer(device, index) for index in others):
        raise NoSharedMemoryError("a GPU cannot reach another's memory")


def _allocate(group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> torch.Tensor:
    """An allocation of its own, as torch makes its workspace; `symmetric_memory.empty` may cut one from a pool."""
    from torch._C._distributed_c10d import _SymmetricMemory  # noqa: PLC0415 - not part of every build of torch

    return _SymmetricMemory.empty_strided_p2p((num_bytes,), [1], torch.uint8, device, group.group_name).zero_()


def _rendezvous(group: dist.ProcessGroup, tensor: torch.Tensor, device: torch.device) -> MappedMemory:
    from torch.distributed import _symmetric_memory  # noqa: PLC0415 - not part of every build of torch

    torch.cuda.synchronize(device)  # zeros are there before anybody else looks
    handle = _symmetric_memory.rendezvous(tensor, group.group_name)
    addresses = list(handle.buffer_ptrs)
    if addresses[dist.get_rank(group)] != tensor.data_ptr():
        raise NoSharedMemoryError("the buffer is not where the rendezvous says")
    return MappedMemory(addresses, tensor, handle)


def _try_out(peers: Peers, device: torch.device) -> None:
    """Two sums of each kind, so that both halves of the slots are used; compiles the kernel for bfloat16."""
    num_ranks = peers.num_ranks
    for numel in _TRIED:
        for call in range(2):
            mine = torch.arange(numel, device=device) % 7 + peers.rank + call
            expected = num_ranks * (torch.arange(numel, device=device) % 7 + call) + num_ranks * (num_ranks - 1) // 2
            if not torch.equal(all_reduce(mine.to(torch.bfloat16), peers), expected.to(torch.bfloat16)):
                raise NoSharedMemoryError("a sum over shared memory was wrong")
