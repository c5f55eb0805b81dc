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

    def __init__(self, sender: int, receiver: int) -> None:
        self._sender, self._receiver = sender, receiver
        self._group = dist.new_group([sender, receiver])
        self._sent: deque[tuple[dist.Work | None, torch.Tensor]] = deque()

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
        while self._sent and (self._sent[0][0] is None or self._sent[0][0].is_completed()):
            self._sent.popleft()
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, self._receiver, group=self._group), tensor))

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


def connect(parallel: Parallel, num_layers: int, rank: int, device: torch.device) -> tuple[Shard, Neighbours]:
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
    return shard, _edges(pp, tp, rank, device)


def _edges(pp: int, tp: int, rank: int, device: torch.device) -> Neighbours:
    if pp == 1:
        return Neighbours(None, None, None)
    mine: dict[str, Edge] = {}
    for sender in range((pp - 1) * tp):
        edge = Edge(sender, sender + tp)
        edge.greet(rank, device)
        if sender == rank:
            mine["after"] = edge
        elif sender + tp == rank:
            mine["before"] = edge
    for tp_rank in range(tp):
        last = (pp - 1) * tp + tp_rank
        edge = Edge(last, tp_rank)
        edge.greet(rank, device)
        if rank in (last, tp_rank):
            mine["tokens"] = edge
    return Neighbours(mine.get("before"), mine.get("after"), mine.get("tokens"))
