"""Tensors from one GPU into the memory of another of the same host, with no kernel that waits.

Both ends of an edge have a buffer that the other one sees: a counter, then slots. The receiver's slots are used in
turn; the sender's are not used at all (symmetric memory is of one size), its counter is.

    sender's stream     wait until (own counter) slots are free; copy into a slot; write receiver's counter = sent
    receiver's stream   wait until (own counter) has come; copy out of the slot; write sender's counter = taken

Waits and writes are the driver's stream memory operations, which the GPU's front end does: nothing runs on a
multiprocessor while a stream waits. The copy to the other GPU is a copy engine's; the one out of the slot, within a
GPU, is a short kernel as any `tensor.copy_` there.

Why the receiver reads what was sent:
- Operations of one stream start when the one before has ended, on whichever engine it ran. So a counter is written
  after the copy, and that write "is preceded by a system-wide memory fence, equivalent to a __threadfence_system() but
  scoped to the stream" (CUDA driver API, cuStreamWriteValue32): who sees the counter sees the slot.
- The slot lies in the receiver's memory, so writes of its peer go through the receiver's own L2 cache, and what its
  stream does after the wait reads there. Where a device may reorder writes that come from outside,
  CU_STREAM_WAIT_VALUE_FLUSH settles them; it is asked for where the device has it.
- A slot is written again only after its reader has written the sender's counter, and that only after it has read.
This is NVSHMEM's put with signal on a stream, and what NCCL does with copy engines.

Why nobody waits for ever: what a wait needs was launched before it. Order all operations of a process as its host
launched them. Taking the k-th tensor needs the k-th put. Putting the k-th needs the take of k - num_slots, which is in
a step of the receiver that depends on nothing later than what this sender launched before: hidden states of step k
are taken in step k, and tokens at most `max_in_flight` steps after they were sampled, whether a step needs them or not
(`Stage._feed_in`). So with num_slots >= max_in_flight there is no circle, even if the hardware puts several streams
behind each other, which it may, as it cannot know what they wait for.

Counters only grow. They are compared cyclically, as int32 differences, so they may overflow.

A process that ends while its stream waits: no destructor may wait for the GPU, and that of symmetric memory does, so
the memory is kept until the process ends. Workers end by a signal or `os._exit`, where nothing is destroyed.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from gllm.runtime.worker.symmetric import NoSharedMemoryError, map_memory, together

if TYPE_CHECKING:
    from gllm.runtime.worker.symmetric import MappedMemory

COUNTER_BYTES = 256
"""At the start of each buffer: a uint32, and nothing beside it that anybody writes."""

_ALIGNMENT = 256
_MASK = 0xFFFFFFFF
_TRIED_BYTES = 1 << 20

# cuda.h
_WAIT_GEQ, _WAIT_FLUSH = 0, 1 << 30
_CAN_FLUSH_REMOTE_WRITES = 98

_kept: list[MappedMemory] = []  # until the process ends: see above


class StreamOperations(Protocol):
    """What streams do for a ring; `stream` is a CUstream, addresses are the device's. Nobody waits on the host."""

    def wait(self, stream: int, address: int, value: int) -> None:
        """Go on when the uint32 there has reached the value."""

    def write(self, stream: int, address: int, value: int) -> None:
        """Write a uint32 there, behind a memory fence."""

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """Copy from one place to the other, on any GPU that this one reaches."""


class CudaDriver:
    """`StreamOperations` of libcuda, for the device that is current now.

    Raises:
        OSError, AttributeError: there is no such library, or it is too old.
        RuntimeError: the driver refuses, here or in a method; says what and how it calls that.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._name_error = library.cuGetErrorName
        u32, u64, stream = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
        # cuda.h renames them: without _v2 they are an older interface, which is switched off.
        self._wait = self._checked(library.cuStreamWaitValue32_v2, stream, u64, u32, ctypes.c_uint)
        self._write = self._checked(library.cuStreamWriteValue32_v2, stream, u64, u32, ctypes.c_uint)
        self._copy = self._checked(library.cuMemcpyAsync, u64, u64, ctypes.c_size_t, stream)
        device, can_flush = ctypes.c_int(), ctypes.c_int()
        self._checked(library.cuCtxGetDevice, ctypes.c_void_p)(ctypes.addressof(device))
        self._checked(library.cuDeviceGetAttribute, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)(
            ctypes.addressof(can_flush), _CAN_FLUSH_REMOTE_WRITES, device
        )
        self._wait_flags = _WAIT_GEQ | (_WAIT_FLUSH if can_flush.value else 0)

    def _checked(self, function: Any, *kinds: Any) -> Any:  # noqa: ANN401 - ctypes has no types for functions
        def check(status: int, _function: object, _arguments: object) -> None:
            if status:
                name = ctypes.c_char_p()
                self._name_error(status, ctypes.byref(name))
                raise RuntimeError(f"{function.__name__}: {(name.value or b'error %d' % status).decode()}")

        function.argtypes, function.restype, function.errcheck = kinds, ctypes.c_int, check
        return function

    def wait(self, stream: int, address: int, value: int) -> None:
        """As `StreamOperations` says."""
        self._wait(stream, address, value, self._wait_flags)

    def write(self, stream: int, address: int, value: int) -> None:
        """As `StreamOperations` says."""
        self._write(stream, address, value, 0)

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """As `StreamOperations` says."""
        self._copy(target, source, num_bytes, stream)


class Ring:
    """One end of an edge's slots; the sender calls `put` alone, the receiver `take` alone, both in the same order.

    Args:
        operations: that streams do.
        mine: where this end's buffer is, `ring_bytes` long and zero.
        theirs: where the other end's is, as this device sees it.
        num_slots: tensors that may have been sent and not taken before a sender's stream waits.
        slot_bytes: of the largest tensor.
    """

    def __init__(
        self, operations: StreamOperations, mine: int, theirs: int, *, num_slots: int, slot_bytes: int
    ) -> None:
        self._operations, self._mine, self._theirs = operations, mine, theirs
        self._num_slots, self.slot_bytes = num_slots, slot_bytes
        self._count = 0  # of tensors put, or taken

    def _slot(self, base: int) -> int:
        return base + COUNTER_BYTES + self._count % self._num_slots * _stride(self.slot_bytes)

    def put(self, stream: int, source: int, num_bytes: int) -> None:
        """Have a stream send what lies at `source`, which must stay until that is done."""
        assert num_bytes <= self.slot_bytes, "larger than a slot"
        if self._count >= self._num_slots:
            self._operations.wait(stream, self._mine, (self._count - self._num_slots + 1) & _MASK)
        if num_bytes:
            self._operations.copy(stream, self._slot(self._theirs), source, num_bytes)
        self._tell(stream)

    def take(self, stream: int, target: int, num_bytes: int) -> None:
        """Have a stream wait for the next tensor and move it to `target`."""
        assert num_bytes <= self.slot_bytes, "larger than a slot"
        self._operations.wait(stream, self._mine, (self._count + 1) & _MASK)
        if num_bytes:
            self._operations.copy(stream, target, self._slot(self._mine), num_bytes)
        self._tell(stream)

    def _tell(self, stream: int) -> None:
        self._count += 1
        self._operations.write(stream, self._theirs, self._count & _MASK)


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT


def ring_bytes(num_slots: int, slot_bytes: int) -> int:
    """Of one end's buffer."""
    return COUNTER_BYTES + num_slots * _stride(slot_bytes)


def share_ring(
    group: dist.ProcessGroup, device: torch.device, *, is_sender: bool, num_slots: int, slot_bytes: int
) -> Ring:
    """Make both ends of a ring between two GPUs; the two ranks of the group call this, with the same sizes.

    Raises:
        NoSharedMemoryError: one of them cannot; raised on both.
    """
    operations = together(group, CudaDriver)
    mapped = map_memory(group, device, ring_bytes(num_slots, slot_bytes))
    _kept.append(mapped)
    rank = dist.get_rank(group)  # not who sends: a group sorts its ranks
    mine, theirs = mapped.addresses[rank], mapped.addresses[1 - rank]
    ring = Ring(operations, mine, theirs, num_slots=num_slots, slot_bytes=slot_bytes)
    for number in range(num_slots + 1):  # once round, and into the first slot again
        for end, tries in ((True, _try_put), (False, _try_take)):
            together(group, partial(tries if is_sender is end else _nothing, ring, mapped.mine, number))
    return ring


def _nothing(_ring: Ring, _mine: torch.Tensor, _number: int) -> None:
    """It is the other end's turn."""


def _try_put(ring: Ring, mine: torch.Tensor, number: int) -> None:
    """Send a tensor when it is seen on the host that the slot is free: if it were not, a stream would wait for ever."""
    _expect_counter(mine, number)
    tensor = _pattern(ring, mine.device, number)
    ring.put(torch.cuda.current_stream(mine.device).cuda_stream, tensor.data_ptr(), tensor.nbytes)
    torch.cuda.synchronize(mine.device)


def _try_take(ring: Ring, mine: torch.Tensor, number: int) -> None:
    """Take it when it is seen on the host that it has come."""
    _expect_counter(mine, number + 1)
    expected = _pattern(ring, mine.device, number)
    tensor = torch.zeros_like(expected)
    ring.take(torch.cuda.current_stream(mine.device).cuda_stream, tensor.data_ptr(), tensor.nbytes)
    if not torch.equal(tensor, expected):
        raise NoSharedMemoryError("a tensor came otherwise than it was sent")
    torch.cuda.synchronize(mine.device)


def _expect_counter(mine: torch.Tensor, value: int) -> None:
    found = int(mine[:4].view(torch.int32).item())
    if found != value:
        raise NoSharedMemoryError(f"the other end's counter says {found} after {value} tensors")


def _pattern(ring: Ring, device: torch.device, number: int) -> torch.Tensor:
    size = min(ring.slot_bytes, _TRIED_BYTES)
    return ((torch.arange(size, device=device) + number) % 251).to(torch.uint8)
