"""A run's columns and its decision log, kept while it happens: what the simulator keeps of its own runs."""

from __future__ import annotations

import io
import json
from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.decision_log import DecisionLog
from gllm.report.record import RunRecord
from gllm.report.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.core import Limits, Request, StepResult, Turn
    from gllm.runtime.engine.sequences import Flight
    from gllm.runtime.messages import StageTime


class Recording:
    """Feeds a `Recorder` and a decision log from the loop's turns; stage times may come late."""

    def __init__(self, limits: Limits, log_path: str) -> None:
        self.keeps_log = bool(log_path)
        self._limits = limits
        self._recorder = Recorder(limits.depth)
        self._log = DecisionLog(Path(log_path) if log_path else None)
        self._back: deque[tuple[Flight, int]] = deque()  # until all stages have told their times
        self._times: dict[int, dict[int, tuple[int, int]]] = {}  # plan -> stage -> (start, end)

    def turn(
        self, now: int, results: Sequence[StepResult], requests: list[Request], aborts: list[int], turn: Turn
    ) -> None:
        """Note a turn, right after it was taken."""
        if requests:
            self._recorder.submit(requests)
        self._recorder.events(now, turn.events)
        self._log.write(now, results, requests, aborts, turn)

    def batch(self, flight: Flight, now: int) -> None:
        """Note a step that came back."""
        self._back.append((flight, now))
        self._drain()

    def stage_time(self, report: StageTime, zero_ns: int) -> None:
        """Note when a stage computed a step, on the clock whose zero is `zero_ns`."""
        stages = self._times.setdefault(report.plan, {})
        stages[report.stage] = report.start_ns - zero_ns, report.end_ns - zero_ns
        self._drain()

    def _drain(self) -> None:
        depth = self._limits.depth
        while self._back and len(self._times.get(self._back[0][0].plan.id, ())) == depth:
            flight, done_ns = self._back.popleft()
            stages = self._times.pop(flight.plan.id)
            starts, ends = zip(*(stages[stage] for stage in range(depth)), strict=True)
            costs = [end - start for start, end in zip(starts, ends, strict=True)]
            self._recorder.batch(flight.plan, flight.dispatched_ns, flight.queue, done_ns, ends, costs)

    @property
    def is_whole(self) -> bool:
        """Whether the times of all steps that came back are known."""
        return not self._back

    def pack(self, wall_s: float) -> bytes:
        """Close the log; return the record for `unpack`."""
        self._log.close()
        record = self._recorder.record(
            config={},
            mode="measured",
            wall_s=wall_s,
            decision_sha256=self._log.sha256,
            num_blocks=self._limits.num_blocks,
            block_size=self._limits.block_size,
        )
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        arrays = {name: np.array(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in values.items() if name not in arrays}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, _plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    def discard(self) -> None:
        """Leave no log behind."""
        self._log.discard()


def unpack(columns: bytes, config: dict[str, Any]) -> RunRecord:
    """The record that `Recording.pack` packed, with the configuration that produced it."""
    with np.load(io.BytesIO(columns)) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    plain = json.loads(values.pop("_plain").tobytes())
    return RunRecord(**{**plain, **values, "config": config})
