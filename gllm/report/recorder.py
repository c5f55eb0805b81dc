"""Collects the columns of a run while it happens; the same in the simulator and in the runtime.

Everything is appended to packed buffers: some ten nanoseconds a number, eight bytes each, whatever
the length of the run. What the columns mean stands in `record.py`, what is computed from them in
`metrics.py`.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.core import NEVER, Finished, FirstToken, Preempted, Rejected, Scheduled
from gllm.report.record import BATCH_DTYPE, GAP_DTYPE, REQUEST_DTYPE, STATUSES, RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gllm.core import Event, Plan, Request

_STATUS = {name: number for number, name in enumerate(STATUSES)}
_REJECTED = _STATUS["rejected"]
_REQUEST_COLUMNS = REQUEST_DTYPE.names or ()
_BATCH_COLUMNS = BATCH_DTYPE.names or ()


class Recorder:
    """Feed it every request, event and batch; ask for the `RunRecord` at the end.

    Request ids are row numbers: 0, 1, 2, ... in order of submission.
    """

    def __init__(self, num_stages: int) -> None:
        self.num_ended = 0  # requests that finished or were rejected; progress bars watch it
        self._num_stages = num_stages
        self._requests = {name: array("q") for name in _REQUEST_COLUMNS}
        self._arrival, self._scheduled, self._first_token, self._finish, *rest = self._requests.values()
        self._prompt, self._output, self._cached, self._preemptions, self._status = rest
        self._width = len(_BATCH_COLUMNS) + 2 + 2 * num_stages
        self._row = struct.Struct(f"{self._width}q").pack
        self._batches = bytearray()
        self._gaps = array("q")

    @property
    def num_submitted(self) -> int:
        """Requests seen so far."""
        return len(self._arrival)

    def submit(self, requests: Sequence[Request]) -> None:
        """Open a row for each request."""
        self._arrival.extend([request.arrival_ns for request in requests])
        self._prompt.extend([request.num_prompt_tokens for request in requests])
        never, zero = array("q", [-1]) * len(requests), array("q", [0]) * len(requests)
        for column in (self._scheduled, self._first_token, self._finish):
            column.extend(never)
        for column in (self._output, self._cached, self._preemptions, self._status):
            column.extend(zero)

    def events(self, now: int, events: Iterable[Event]) -> None:
        """Note what happened to requests in a turn."""
        for event in events:
            kind = type(event)
            row = event.id
            if kind is FirstToken:
                self._first_token[row] = now
            elif kind is Scheduled:
                self._scheduled[row] = now
                self._cached[row] = event.num_cached_tokens  # type: ignore[union-attr]
            elif kind is Finished:
                self._finish[row] = now
                self._output[row] = event.num_output_tokens  # type: ignore[union-attr]
                self._status[row] = _STATUS[event.reason]  # type: ignore[union-attr]
                self.num_ended += 1
            elif kind is Preempted:
                self._preemptions[row] += 1
            elif kind is Rejected:
                self._finish[row] = now
                self._status[row] = _REJECTED
                self.num_ended += 1

    def batch(  # noqa: PLR0917 - positional: once for each micro-batch
        self,
        plan: Plan,
        dispatched_ns: int,
        queue: tuple[int, int],
        done_ns: int,
        ends_ns: Iterable[int],
        costs_ns: Iterable[int],
    ) -> None:
        """Note a batch that is back; batches come in the order of plans.

        Args:
            plan: the batch.
            dispatched_ns: when it was planned.
            queue: sequences waiting and running after it was planned.
            done_ns: when its tokens were known to the engine.
            ends_ns: when each stage ended it.
            costs_ns: how long each stage computed.
        """
        waiting, running = queue
        num_decode = plan.num_decode_tokens
        if plan.joined:
            num_decode -= self._note_gaps(plan, done_ns)
        self._batches += self._row(
            dispatched_ns,
            plan.num_prefill_tokens,
            plan.num_decode_tokens,
            plan.num_free_blocks,
            waiting,
            running,
            plan.previous,
            num_decode,
            done_ns,
            plan.num_discarded,
            *ends_ns,
            *costs_ns,
        )
        if plan.prefilled:
            for chunk in plan.chunks:
                if chunk.final and chunk.previous != NEVER:  # the sequence may have been preempted again by now
                    self._gaps.extend((chunk.previous, plan.id))

    def _note_gaps(self, plan: Plan, done_ns: int) -> int:
        """Note the gaps of those that joined; return how many of them the shared gap must not count.

        Who had stopped before, planned ahead, has no gap, and is among the batch's discarded tokens.
        """
        num_gaps = 0
        for joined in plan.joined:
            finish_ns = self._finish[joined.sequence.id]
            if finish_ns < 0 or finish_ns >= done_ns:
                self._gaps.extend((joined.previous, plan.id))
                num_gaps += 1
        return num_gaps

    def record(
        self,
        *,
        config: Mapping[str, Any],
        mode: str,
        wall_s: float,
        decision_sha256: str | None,
        num_blocks: int,
        block_size: int,
    ) -> RunRecord:
        """All columns as numpy arrays; batches that never came back are left out."""
        requests = np.zeros(self.num_submitted, REQUEST_DTYPE)
        for name, column in self._requests.items():
            requests[name] = column
        # Views of the buffer, not copies: it is the largest thing a run keeps.
        rows = np.frombuffer(self._batches, np.int64).reshape(-1, self._width)
        first = len(_BATCH_COLUMNS)
        ends, costs = np.split(rows[:, first + 2 :], 2, axis=1)
        batch = _padded(BATCH_DTYPE, 8 * self._width)
        return RunRecord(
            config=config,
            mode=mode,
            wall_s=wall_s,
            decision_sha256=decision_sha256,
            num_blocks=num_blocks,
            block_size=block_size,
            requests=requests,
            batches=np.frombuffer(self._batches, batch),
            done_ns=rows[:, first],
            num_discarded=rows[:, first + 1],
            gaps=np.frombuffer(self._gaps, GAP_DTYPE) if self._gaps else np.zeros(0, GAP_DTYPE),
            stage_start_ns=ends - costs,
            stage_end_ns=ends,
        )


def _padded(dtype: np.dtype[np.void], itemsize: int) -> np.dtype[np.void]:
    """The same columns in wider rows."""
    fields = dict(dtype.fields or {})
    formats, offsets = zip(*(field[:2] for field in fields.values()), strict=True)
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": itemsize})
