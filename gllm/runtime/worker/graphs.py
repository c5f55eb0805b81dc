"""CUDA graphs of steps: hundreds of kernels for one launch, and on the last stage one more for its tokens.

A graph replays the same kernels on the same memory, so there is one for each of some sizes, and a step in between is
padded: with rows of a slot that no sequence has, which read no keys and write nothing. All graphs share one pool of
memory, since what one leaves there the next one need not keep.

Shapes: S sequences, T tokens, R sampled rows, D hidden size.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gllm.graph_sizes import MAX_CHUNKS, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gllm_kernels.step_inputs import StepRows
    from torch import Tensor

    from gllm.runtime.worker.inputs import RowLayout

    Compute = Callable[[Tensor, Tensor | None], Tensor]
    ComputeRows = Callable[[StepRows, Tensor | None], Tensor]
    Choose = Callable[[Tensor, Tensor], Tensor]


class GraphPool:
    """Where graphs are captured, and keep what they compute on the way."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()

    def capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of what this launches."""
        work()  # compiles kernels, makes handles and workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph


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
        sizes: batch sizes, increasing.
        pool: where to capture.
        padding_slot: the slot of rows that are not there.
        hidden_size: of the hidden states that come in; None on the first stage.
        dtype: of hidden states.
        device: of everything.
    """

    def __init__(
        self,
        compute: Compute,
        choose: Choose | None,
        sizes: Sequence[int],
        *,
        pool: GraphPool,
        padding_slot: int,
        hidden_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._sizes = sizes
        self._padding_slot = padding_slot
        self._slots = torch.full((self.largest,), padding_slot, dtype=torch.int32, device=device)
        self._hidden = _room(self.largest, hidden_size, dtype, device)
        self._captured: dict[int, _Captured] = {}
        self._newest: _Captured | None = None
        self._filled: Tensor | None = None
        self._capture(compute, choose, pool)

    def _capture(self, compute: Compute, choose: Choose | None, pool: GraphPool) -> None:
        # The largest comes first: the others' results are its first rows.
        out_SD = torch.empty_like(compute(self._slots, self._hidden))
        tokens_S = None if choose is None else torch.empty_like(choose(self._slots, out_SD))
        for size in reversed(self._sizes):
            layers = self._capture_layers(compute, out_SD[:size], pool)
            head = None
            if choose is not None and tokens_S is not None:
                head = self._capture_head(choose, out_SD[:size], tokens_S[:size], pool)
            self._captured[size] = _Captured(layers, out_SD[:size], head, None if tokens_S is None else tokens_S[:size])

    def _capture_layers(self, compute: Compute, out_SD: Tensor, pool: GraphPool) -> torch.cuda.CUDAGraph:
        slots_S = self._slots[: len(out_SD)]
        hidden_SD = None if self._hidden is None else self._hidden[: len(out_SD)]
        return pool.capture(lambda: out_SD.copy_(compute(slots_S, hidden_SD)))

    def _capture_head(self, choose: Choose, out_SD: Tensor, tokens_S: Tensor, pool: GraphPool) -> torch.cuda.CUDAGraph:
        slots_S = self._slots[: len(out_SD)]
        return pool.capture(lambda: tokens_S.copy_(choose(slots_S, out_SD)))

    @property
    def largest(self) -> int:
        """The most sequences that a graph takes."""
        return self._sizes[-1]

    def replay(self, slots_S: Tensor, hidden_SD: Tensor | None) -> Tensor:
        """Compute a batch; what is returned is overwritten by the next one."""
        num = slots_S.numel()
        if slots_S is not self._filled:  # else they are those of the step before
            self._fill(slots_S)
        if hidden_SD is not None:
            assert self._hidden is not None, "the first stage has no hidden states to take in"
            self._hidden[:num].copy_(hidden_SD)
        captured = self._newest = self._captured[padded(num, self._sizes)]
        captured.layers.replay()
        return captured.out_SD[:num]

    def _fill(self, slots_S: Tensor) -> None:
        self._filled = slots_S
        self._slots[: slots_S.numel()].copy_(slots_S)
        self._slots[slots_S.numel() :].fill_(self._padding_slot)

    def choose(self, num: int) -> Tensor:
        """Tokens of the batch just computed, which has `num` sequences; overwritten like it."""
        assert self._newest is not None, "nothing was computed"
        return _chosen(self._newest, num)

    def choose_among(self, x_TD: Tensor, rows_R: Tensor, slots_R: Tensor) -> Tensor:
        """Tokens of some rows of any step's hidden states; overwritten like those of `choose`."""
        num = slots_R.numel()
        self._fill(slots_R)
        captured = self._captured[padded(num, self._sizes)]
        torch.index_select(x_TD, 0, rows_R, out=captured.out_SD[:num])
        return _chosen(captured, num)


class TokenGraphs:
    """Graphs of one stage's part of a step with chunks of prompts, without what follows the last one's layers.

    Args:
        compute: takes rows and, unless the stage is the first, hidden states [T, D]; returns hidden states.
        sizes: numbers of tokens, increasing.
        pool: where to capture.
        layout: of rows.
        num_slots: sequences of a step at most.
        table_width: entries of a block table.
        hidden_size: of the hidden states that come in; None on the first stage.
        dtype: of hidden states.
        device: of everything.
    """

    def __init__(
        self,
        compute: ComputeRows,
        sizes: Sequence[int],
        *,
        pool: GraphPool,
        layout: RowLayout,
        num_slots: int,
        table_width: int,
        hidden_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._sizes = sizes
        nobody, start = np.zeros(0, np.int32), np.zeros(1, np.int32)
        prompts = np.zeros(sizes[-1], np.int32)
        self._packed = torch.from_numpy(layout.pack(nobody, nobody, start, prompts, num_decodes=0)).to(device)
        self._hidden = _room(sizes[-1], hidden_size, dtype, device)
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        self._out_TD: Tensor | None = None
        for size in reversed(sizes):
            most = min(num_slots, size)
            rows = layout.rows(
                self._packed,
                num_rows=most + 1,
                num_decodes=most,
                num_chunks=min(MAX_CHUNKS, size),
                num_tokens=size,
                table_width=table_width,
            )
            self._captured[size] = self._capture(compute, rows, pool)

    def _capture(self, compute: ComputeRows, rows: StepRows, pool: GraphPool) -> torch.cuda.CUDAGraph:
        num_tokens = rows.num_tokens
        hidden_TD = None if self._hidden is None else self._hidden[:num_tokens]
        if self._out_TD is None:  # the largest comes first: the others' results are its first rows
            self._out_TD = torch.empty_like(compute(rows, hidden_TD))
        out_TD = self._out_TD[:num_tokens]
        return pool.capture(lambda: out_TD.copy_(compute(rows, hidden_TD)))

    def takes(self, rows: StepRows) -> bool:
        """Whether there is a graph for this step."""
        return rows.num_tokens <= self._sizes[-1] and rows.num_chunks <= MAX_CHUNKS

    def replay(self, packed: Tensor, num_tokens: int, hidden_TD: Tensor | None) -> Tensor:
        """Compute a step, its rows as the layout packs them; what is returned is overwritten by the next one."""
        self._packed[: packed.numel()].copy_(packed)
        if hidden_TD is not None:
            assert self._hidden is not None, "the first stage has no hidden states to take in"
            self._hidden[:num_tokens].copy_(hidden_TD)
        self._captured[padded(num_tokens, self._sizes)].replay()
        assert self._out_TD is not None
        return self._out_TD[:num_tokens]


def _room(num_rows: int, hidden_size: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return None if hidden_size is None else torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)


def _chosen(captured: _Captured, num: int) -> Tensor:
    assert captured.head is not None, "only the last stage chooses tokens"
    assert captured.tokens_S is not None
    captured.head.replay()
    return captured.tokens_S[:num]
