"""CUDA graphs of decode steps: hundreds of kernels for one launch.

A graph replays the same kernels on the same memory, so there is one for each of some batch sizes; a batch in between
is padded with rows of a slot that no sequence has, which read no keys and write nothing.

Shapes: S sequences, D hidden size.
"""

from __future__ import annotations

import bisect
import gc
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    Compute = Callable[[Tensor, Tensor | None], Tensor]

MAX_ROWS = 512


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: padding costs at most an eighth of a large batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_ROWS + 1, 32)]
    largest = min(max_num_seqs, MAX_ROWS)
    return [*(size for size in sizes if size < largest), largest]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    out_SD: Tensor


class DecodeGraphs:
    """Graphs of `compute`, which takes slots [S] and, unless the stage is the first, hidden states [S, D].

    Args:
        compute: one stage's part of a decode step; returns hidden states [S, D].
        sizes: batch sizes.
        padding_slot: the slot of rows that are not there.
        hidden_size: of the hidden states that come in; None on the first stage.
        dtype: of hidden states.
        device: of everything.
    """

    def __init__(
        self,
        compute: Compute,
        sizes: Iterable[int],
        *,
        padding_slot: int,
        hidden_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._sizes = sorted(sizes)
        largest = self._sizes[-1]
        self._padding_slot = padding_slot
        self._slots = torch.full((largest,), padding_slot, dtype=torch.int32, device=device)
        self._hidden = None
        if hidden_size is not None:
            self._hidden = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self._captured: dict[int, _Captured] = {}
        self._capture(compute)

    def _capture(self, compute: Compute) -> None:
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        out: Tensor | None = None
        for size in reversed(self._sizes):
            slots = self._slots[:size]
            hidden = None if self._hidden is None else self._hidden[:size]
            warm = compute(slots, hidden)  # compiles kernels, makes handles and workspaces
            if out is None:  # the largest comes first: the others' results are its first rows
                out = torch.empty_like(warm)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out[:size].copy_(compute(slots, hidden))
            self._captured[size] = _Captured(graph, out[:size])

    @property
    def largest(self) -> int:
        """The most sequences that a graph takes."""
        return self._sizes[-1]

    def replay(self, slots_S: Tensor, hidden_SD: Tensor | None) -> Tensor:
        """Compute a batch; what is returned is overwritten by the next one."""
        num = slots_S.numel()
        size = self._sizes[bisect.bisect_left(self._sizes, num)]
        self._slots[:num].copy_(slots_S)
        if size > num:
            self._slots[num:size].fill_(self._padding_slot)
        if hidden_SD is not None:
            assert self._hidden is not None, "the first stage has no hidden states to take in"
            self._hidden[:num].copy_(hidden_SD)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.out_SD[:num]
