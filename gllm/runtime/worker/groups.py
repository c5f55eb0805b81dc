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

from gllm.runtime.shard import Shard, SoloCommunicator

if TYPE_CHECKING:
    from gllm.parallel import Parallel


@dataclass(frozen=True, slots=True)
class StageCommunicator:
    """The ranks of one stage."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of everyone's tensor, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everyone's tensor side by side along the last dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


class Edge:
    """One way from one rank to another; tensors arrive in the order in which they were sent."""

    def __init__(self, sender: int, receiver: int, max_in_flight: int) -> None:
        self._sender, self._receiver, self._max_in_flight = sender, receiver, max_in_flight
        self._group = dist.new_group([sender, receiver])
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def greet(self, rank: int, device: torch.device) -> None:
        """Connect both ends now: NCCL's first call on a group waits for the other end's, which may have to wait first.

        All ranks greet along the same edges in the same order.
        """
        hello = torch.zeros(1, device=device)
        if rank == self._sender:
            dist.send(hello, self._receiver, group=self._group)
        elif rank == self._receiver:
            dist.recv(hello, self._sender, group=self._group)

    def send(self, tensor: torch.Tensor) -> None:
        """Send without waiting; the tensor must not be written any more."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._receiver, group=self._group)
        assert work is not None, "the sender is in the group"
        self._sent.append((work, tensor))
        if len(self._sent) > self._max_in_flight:  # received long ago, which gloo tells only to who waits for it
            self._sent.popleft()[0].wait()

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill `tensor` with the next one sent."""
        dist.recv(tensor, self._sender, group=self._group)
        return tensor


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One rank's edges; None where the pipeline ends."""

    before: Edge | None  # hidden states from the stage before
    after: Edge | None  # hidden states to the next one
    tokens: Edge | None  # sampled tokens, from the last stage to the first


def connect(
    parallel: Parallel, num_layers: int, rank: int, device: torch.device, max_in_flight: int
) -> tuple[Shard, Neighbours]:
    """Make all groups, in the same order on every rank; return this rank's."""
    tp, pp = parallel.tp, parallel.pp
    stage, tp_rank = divmod(rank, tp)
    communicator: StageCommunicator | SoloCommunicator = SoloCommunicator()
    for index in range(pp):
        if tp > 1:
            group = dist.new_group(list(range(index * tp, (index + 1) * tp)))
            if index == stage:
                communicator = StageCommunicator(group, tp_rank, tp)
                communicator.all_reduce(torch.zeros(1, device=device))  # connects
    shard = Shard(
        layers=parallel.layers_of_stage(num_layers, stage),
        tp_rank=tp_rank,
        tp_size=tp,
        ep_size=parallel.ep,
        is_first=stage == 0,
        is_last=stage == pp - 1,
        group=communicator,
    )
    return shard, _edges(parallel, rank, device, max_in_flight)


def _edges(parallel: Parallel, rank: int, device: torch.device, max_in_flight: int) -> Neighbours:
    pp, tp = parallel.pp, parallel.tp
    if pp == 1:
        return Neighbours(None, None, None)
    mine: dict[str, Edge] = {}
    for sender in range((pp - 1) * tp):
        edge = Edge(sender, sender + tp, max_in_flight)
        edge.greet(rank, device)
        if sender == rank:
            mine["after"] = edge
        elif sender + tp == rank:
            mine["before"] = edge
    for tp_rank in range(tp):
        last = (pp - 1) * tp + tp_rank
        edge = Edge(last, tp_rank, max_in_flight)
        edge.greet(rank, device)
        if rank in (last, tp_rank):
            mine["tokens"] = edge
    return Neighbours(mine.get("before"), mine.get("after"), mine.get("tokens"))
