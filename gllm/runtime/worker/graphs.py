"""CUDA graphs of decode steps: hundreds of kernels for one launch, and on the last stage one more for its tokens.

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
    Choose = Callable[[Tensor, Tensor], Tensor]


class _Captured(NamedTuple):
    layers: torch.cuda.CUDAGraph
    out_SD: Tensor
    head: torch.cuda.CUDAGraph | None
    tokens_S: Tensor | None


class DecodeGraphs:
    """Graphs of one stage's part of a decode step, and of what follows the last one's layers.

    Args:
        compute: takes slots [S] and, unless the stage is the first, hidden states [S, D]; returns hidden states.
        choose: on the last stage, takes slots and those hidden states; returns tokens [S].
        sizes: batch sizes.
        padding_slot: the slot of rows that are not there.
        hidden_size: of the hidden states that come in; None on the first stage.
        dtype: of hidden states.
        device: of everything.
    """

    def __init__(
        self,
        compute: Compute,
        choose: Choose | None,
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
        self._newest: _Captured | None = None
        self._filled: Tensor | None = None
        self._capture(compute, choose)

    def _capture(self, compute: Compute, choose: Choose | None) -> None:
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        # The largest comes first: the others' results are its first rows.
        out_SD = torch.empty_like(compute(self._slots, self._hidden))
        tokens_S = None if choose is None else torch.empty_like(choose(self._slots, out_SD))

        def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
            work()  # compiles kernels, makes handles and workspaces
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            return graph

        for size in reversed(self._sizes):
            slots, out = self._slots[:size], out_SD[:size]
            hidden = None if self._hidden is None else self._hidden[:size]
            layers = captured(lambda: out.copy_(compute(slots, hidden)))  # noqa: B023 - called at once
            head = tokens = None
            if choose is not None and tokens_S is not None:
                tokens = tokens_S[:size]
                head = captured(lambda: tokens.copy_(choose(slots, out)))  # noqa: B023
            self._captured[size] = _Captured(layers, out, head, tokens)

    @property
    def largest(self) -> int:
        """The most sequences that a graph takes."""
        return self._sizes[-1]

    def replay(self, slots_S: Tensor, hidden_SD: Tensor | None) -> Tensor:
        """Compute a batch; what is returned is overwritten by the next one."""
        num = slots_S.numel()
        size = self._sizes[bisect.bisect_left(self._sizes, num)]
        if slots_S is not self._filled:  # else they are those of the step before
            self._filled = slots_S
            self._slots[:num].copy_(slots_S)
            self._slots[num:].fill_(self._padding_slot)
        if hidden_SD is not None:
            assert self._hidden is not None, "the first stage has no hidden states to take in"
            self._hidden[:num].copy_(hidden_SD)
        captured = self._newest = self._captured[size]
        captured.layers.replay()
        return captured.out_SD[:num]

    def choose(self, num: int) -> Tensor:
        """Tokens of the batch just computed, which has `num` sequences; overwritten like it."""
        assert self._newest is not None, "nothing was computed"
        assert self._newest.head is not None, "only the last stage chooses tokens"
        assert self._newest.tokens_S is not None
        self._newest.head.replay()
        return self._newest.tokens_S[:num]
