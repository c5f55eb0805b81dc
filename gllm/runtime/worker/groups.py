"""Who talks to whom: the ranks of a stage among each other, and each rank with its neighbours in the pipeline.

Rank = stage * tp + tp_rank. Every edge of the pipeline has a group of its own: calls of one group wait for each
other, and an activation must not wait behind another edge's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from gllm_kernels.all_reduce import all_reduce_triton, takes

from gllm.console.terminal import warn
from gllm.runtime.shard import Shard, SoloCommunicator
from gllm.runtime.worker.ring import Ring, share_ring
from gllm.runtime.worker.symmetric import SEVERAL_HOSTS, NoSharedMemoryError, SharedMemory, share_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.model_shape import ModelShape
    from gllm.parallel import Parallel

_MAX_SLOT_BYTES = 32 << 20  # at both ends of each edge, one slot more than steps may be on the road
_TOKENS_BYTES = 64 << 10  # 8192 sampled tokens

# Its names since torch 2.13 and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class StageCommunicator:
    """The ranks of one stage; they call its methods in the same order, on one stream, with tensors of one shape."""

    group: dist.ProcessGroup
    rank: int
    size: int
    memory: SharedMemory | None = None  # for sums of a decoding step's size, which NCCL is slow at
    why_none: str = ""  # there is no such memory

    @property
    def method(self) -> str:
        """How small tensors are summed, in words; the same on all ranks."""
        return "shared memory" if self.memory is not None else f"process group ({self.why_none})"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of everyone's tensor, in place; the same bits on all ranks."""
        if self.memory is not None and takes(tensor, self.size):
            return all_reduce_triton(tensor, self.memory.peers)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everyone's tensor side by side along the last dimension."""
        everyones = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(everyones, tensor.contiguous(), group=self.group)
        return everyones.view(self.size, *tensor.shape).movedim(0, -2).flatten(-2)


class Edge:
    """One way from one rank to another; tensors arrive in the order in which they were sent.

    Between GPUs of one host that share memory they go through a ring in the receiver's, where nothing waits on a
    multiprocessor (`ring`). The process group takes what is larger than a slot of the ring, and all where there is
    none. On GPUs no computing stream waits for a send, and it waits for a receive only where the tensor is needed.

    Args:
        sender: a rank.
        receiver: another.
        max_in_flight: steps that may be on the road.
        largest_bytes: of a tensor that is worth a slot of the ring; 0: no ring.
    """

    def __init__(self, sender: int, receiver: int, max_in_flight: int, largest_bytes: int = _MAX_SLOT_BYTES) -> None:
        self._sender, self._receiver, self._max_in_flight = sender, receiver, max_in_flight
        self._slot_bytes = min(largest_bytes, _MAX_SLOT_BYTES)
        self._group = dist.new_group([sender, receiver])
        self._stream: torch.cuda.Stream | None = None  # for transfers, on a GPU
        self._ring: Ring | None = None
        self._why_no_ring = "no GPU" if self._slot_bytes else "no slots"
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._copied: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    @property
    def method(self) -> str:
        """How tensors go, in words."""
        return "copy" if self._ring is not None else f"process group ({self._why_no_ring})"

    def greet(self, rank: int, device: torch.device) -> None:
        """Connect both ends now: NCCL's first call on a group waits for the other end's, which may have to wait first.

        All ranks greet along the same edges in the same order.
        """
        if rank not in (self._sender, self._receiver):
            return
        hello = torch.zeros(1, device=device)
        if rank == self._sender:
            dist.send(hello, self._receiver, group=self._group)
        else:
            dist.recv(hello, self._sender, group=self._group)
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if self._slot_bytes:
                self._share_ring(device, is_sender=rank == self._sender)

    def _share_ring(self, device: torch.device, *, is_sender: bool) -> None:
        num_slots = self._max_in_flight + 1
        try:
            self._ring = share_ring(
                self._group, device, is_sender=is_sender, num_slots=num_slots, slot_bytes=self._slot_bytes
            )
        except NoSharedMemoryError as error:
            self._why_no_ring = str(error)
            # Between hosts that is as it should be; within one it may be something to mend, a driver or a container.
            # Rank 0 sends along one edge only, and its line speaks for all: GPUs of a host are mostly connected alike.
            if is_sender and self._sender == 0 and self._why_no_ring != SEVERAL_HOSTS:
                warn(f"stages send through NCCL, as their GPUs share no memory: {error}")

    def _ring_for(self, num_bytes: int) -> Ring | None:
        """Both ends know the size, so they agree."""
        return self._ring if self._ring is not None and num_bytes <= self._ring.slot_bytes else None

    def send(self, tensor: torch.Tensor) -> None:
        """Send without waiting; the tensor must not be written any more."""
        tensor = tensor.contiguous()
        ring = self._ring_for(tensor.nbytes)
        if ring is not None:
            self._put(ring, tensor)
            return
        work = dist.isend(tensor, self._receiver, group=self._group)
        assert work is not None, "the sender is in the group"
        self._sent.append((work, tensor))
        if tensor.is_cuda:  # to wait would make the stream wait; the engine lets only so many be on the road
            while self._sent and self._sent[0][0].is_completed():
                self._sent.popleft()
        elif len(self._sent) > self._max_in_flight:  # received long ago, which gloo tells only to who waits for it
            self._sent.popleft()[0].wait()

    def _put(self, ring: Ring, tensor: torch.Tensor) -> None:
        assert self._stream is not None, "a ring is between GPUs"
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        ring.put(self._stream.cuda_stream, tensor.data_ptr(), tensor.nbytes)
        self._keep_until_copied(tensor, self._stream)

    def _keep_until_copied(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Hold memory that a stream copies from and knows nothing of until it has; then it may be used again."""
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(stream)
        self._copied.append((copied, tensor))
        while self._copied and self._copied[0][0].query():  # type: ignore[no-untyped-call]
            self._copied.popleft()

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill `tensor`, which is contiguous, with the next one sent."""
        if self._stream is None:
            dist.recv(tensor, self._sender, group=self._group)
            return tensor
        current, ring = torch.cuda.current_stream(tensor.device), self._ring_for(tensor.nbytes)
        if ring is not None:
            assert tensor.is_contiguous(), "a ring copies bytes"
            ring.take(current.cuda_stream, tensor.data_ptr(), tensor.nbytes)
            return tensor
        # Behind all that the current stream has been given: NCCL's kernel holds multiprocessors until the tensor has
        # come, and a step beside one that waited took 19 % longer.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            arriving = torch.empty_like(tensor)
            work = dist.irecv(arriving, self._sender, group=self._group)
        assert work is not None, "the receiver is in the group"
        work.wait()  # the current stream does, not the host
        tensor.copy_(arriving)
        self._keep_until_copied(arriving, current)
        return tensor


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One rank's edges; None where the pipeline ends."""

    before: Edge | None  # hidden states from the stage before
    after: Edge | None  # hidden states to the next one
    tokens: Edge | None  # sampled tokens, from the last stage to the first


def connect(
    parallel: Parallel,
    shape: ModelShape,
    rank: int,
    device: torch.device,
    max_in_flight: int,
    *,
    largest_bytes: int = _MAX_SLOT_BYTES,
) -> tuple[Shard, Neighbours]:
    """Make all groups, in the same order on every rank; return this rank's.

    Args:
        parallel: how the model is cut.
        shape: of the model.
        rank: this one.
        device: where it computes.
        max_in_flight: steps that may be on the road.
        largest_bytes: of the largest step's hidden states; 0: no edge has a ring (`Edge`).
    """
    tp, pp = parallel.tp, parallel.pp
    stage, tp_rank = divmod(rank, tp)
    communicator: StageCommunicator | SoloCommunicator = SoloCommunicator()
    for index in range(pp):
        if tp > 1:
            group = dist.new_group(list(range(index * tp, (index + 1) * tp)))
            if index == stage:
                communicator = _communicator(group, tp_rank, tp, device)
    shard = Shard(
        layers=parallel.layers_of_stage(shape, stage),
        tp_rank=tp_rank,
        tp_size=tp,
        ep_size=parallel.ep,
        is_first=stage == 0,
        is_last=stage == pp - 1,
        group=communicator,
    )
    return shard, _edges(
        parallel,
        rank,
        device,
        lambda sender, receiver: Edge(sender, receiver, max_in_flight, largest_bytes),
        lambda sender, receiver: Edge(sender, receiver, max_in_flight, min(largest_bytes, _TOKENS_BYTES)),
    )


def _communicator(group: dist.ProcessGroup, rank: int, size: int, device: torch.device) -> StageCommunicator:
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # connects
    try:
        return StageCommunicator(group, rank, size, share_memory(group, device))
    except NoSharedMemoryError as error:
        return StageCommunicator(group, rank, size, why_none=str(error))


def _edges(
    parallel: Parallel,
    rank: int,
    device: torch.device,
    hidden: Callable[[int, int], Edge],
    tokens: Callable[[int, int], Edge],
) -> Neighbours:
    """`hidden`, `tokens`: make an edge from one rank to another."""
    pp, tp = parallel.pp, parallel.tp
    if pp == 1:
        return Neighbours(None, None, None)
    mine: dict[str, Edge] = {}
    for sender in range((pp - 1) * tp):
        edge = hidden(sender, sender + tp)
        edge.greet(rank, device)
        if sender == rank:
            mine["after"] = edge
        elif sender + tp == rank:
            mine["before"] = edge
    for tp_rank in range(tp):
        last = (pp - 1) * tp + tp_rank
        edge = tokens(last, tp_rank)
        edge.greet(rank, device)
        if rank in (last, tp_rank):
            mine["tokens"] = edge
    return Neighbours(mine.get("before"), mine.get("after"), mine.get("tokens"))
