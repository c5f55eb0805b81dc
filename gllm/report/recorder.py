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
from numpy.lib.recfunctions import unstructured_to_structured

from gllm.core import NEVER, Finished, FirstToken, Preempted, Rejected, Scheduled
from gllm.report.record import BATCH_DTYPE, GAP_DTYPE, REQUEST_DTYPE, STATUSES, RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gllm.core import Event, Plan, Request

_STATUS = {name: number for number, name in enumerate(STATUSES)}
_NUMBER = struct.Struct("q")
_REQUEST = struct.Struct(f"{len(REQUEST_DTYPE.names or ())}q")
_FIELDS = REQUEST_DTYPE.fields or {}
_OFFSET: dict[str, int] = {name: int(_FIELDS[name][1]) for name in REQUEST_DTYPE.names or ()}


class Recorder:
    """Feed it every request, event and batch; ask for the `RunRecord` at the end.

    Request ids are row numbers: 0, 1, 2, ... in order of submission.
    """

    def __init__(self, num_stages: int) -> None:
        self.num_ended = 0  # requests that finished or were rejected; progress bars watch it
        self.num_submitted = 0
        self._num_stages = num_stages
        self._requests = bytearray()
        self._batches = bytearray()
        self._width = len(BATCH_DTYPE.names or ()) + 2 + 2 * num_stages
        self._row = struct.Struct(f"{self._width}q").pack
        self._gaps = array("q")

    def submit(self, requests: Iterable[Request]) -> None:
        """Open a row for each request."""
        for request in requests:
            # In the order of REQUEST_DTYPE: nothing has happened yet.
            self._requests += _REQUEST.pack(request.arrival_ns, -1, -1, -1, request.num_prompt_tokens, 0, 0, 0, 0)
            self.num_submitted += 1

    def events(self, now: int, events: Iterable[Event]) -> None:
        """Note what happened to requests in a turn."""
        for event in events:
            kind = type(event)
            if kind is FirstToken:
                self._set(event.id, "first_token_ns", now)
            elif kind is Scheduled:
                self._set(event.id, "scheduled_ns", now)
                self._set(event.id, "num_cached_tokens", event.num_cached_tokens)
            elif kind is Finished:
                self._set(event.id, "num_output_tokens", event.num_output_tokens)
                self._end(event.id, now, event.reason)
            elif kind is Preempted:
                offset = event.id * _REQUEST.size + _OFFSET["num_preemptions"]
                (count,) = _NUMBER.unpack_from(self._requests, offset)
                _NUMBER.pack_into(self._requests, offset, count + 1)
            elif kind is Rejected:
                self._end(event.id, now, "rejected")

    def _set(self, row: int, column: str, value: int) -> None:
        _NUMBER.pack_into(self._requests, row * _REQUEST.size + _OFFSET[column], value)

    def _end(self, row: int, now: int, status: str) -> None:
        self._set(row, "finish_ns", now)
        self._set(row, "status", _STATUS[status])
        self.num_ended += 1

    def batch(
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
        num_decode = plan.num_decode_tokens
        self._batches += self._row(
            dispatched_ns,
            plan.num_prefill_tokens,
            num_decode,
            plan.num_free_blocks,
            *queue,
            plan.previous,
            num_decode - len(plan.joined),
            done_ns,
            plan.num_discarded,
            *ends_ns,
            *costs_ns,
        )
        if plan.joined:
            for joined in plan.joined:
                self._gaps.extend((joined.previous, plan.id))
        for sequence in plan.prefilled:
            if sequence.last_token_plan != NEVER:  # recomputed after a preemption
                self._gaps.extend((sequence.last_token_plan, plan.id))

    def record(  # noqa: D417 - the rest are the record's own fields
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
        rows = np.frombuffer(bytes(self._batches), np.int64).reshape(-1, self._width)
        first = len(BATCH_DTYPE.names or ())
        done, discarded, *_ = rows[:, first : first + 2].T
        ends, costs = np.split(rows[:, first + 2 :], 2, axis=1)
        return RunRecord(
            config=config,
            mode=mode,
            wall_s=wall_s,
            decision_sha256=decision_sha256,
            num_blocks=num_blocks,
            block_size=block_size,
            requests=np.frombuffer(bytes(self._requests), REQUEST_DTYPE),
            batches=unstructured_to_structured(rows[:, :first], BATCH_DTYPE),
            done_ns=done,
            num_discarded=discarded,
            gaps=np.frombuffer(bytes(self._gaps), GAP_DTYPE),
            stage_start_ns=ends - costs,
            stage_end_ns=ends,
        )
