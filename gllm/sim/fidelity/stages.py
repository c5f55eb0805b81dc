"""Where the error comes from: what the cost model says of each recorded micro-batch beside what it took.

The recorded plans are planned again by a simulation on recorded times, which shows each to a `Predictions`. Stage
times are from start to end as the workers stamped them. Where stages have clocks, what a micro-batch is predicted to
take depends on when those before it were computed: for that, too, stamps are taken.

    intake      a request's arrival to the engine's turn with it, where no result brought the turn about
    transfer    a stage's end to the next one's start, where that had nothing to do when the data left
    dispatch    the engine's decision to the start of stage 0, where all results were back
    return      the last stage's end to the engine's turn, where no other micro-batch was on the road
    gap         the end of a step on stage 0 to the start of the next, which was there in time, with its tokens
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gllm.gpu_clock import StageClock
from gllm.sim.cost import COMPONENTS
from gllm.sim.fidelity.factors import component_factors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from gllm.core import Plan
    from gllm.report.record import RunRecord
    from gllm.sim.cost import CostModel, Load
    from gllm.sim.fidelity.factors import Factor

    Times = NDArray[np.int64]

KINDS = ("decode only", "prefill only", "mixed")
ALL = "all"
MIXED_SIZES = (128, 512, 2048)
"""Mixed micro-batches are looked at by their tokens too: so far, and beyond."""


def kind_of(num_prefill_tokens: int, num_decode_tokens: int) -> int:
    """Which of `KINDS` a micro-batch is."""
    return 0 if not num_prefill_tokens else 2 if num_decode_tokens else 1


class Predictions:
    """What a cost model says of plans, in their order."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.kinds: list[int] = []
        self.depends_on: list[int] = []
        self.transfer_ns: list[int] = []
        self.gap_ns: list[int] = []
        self._stage_ns: list[Sequence[int]] = []
        self._loads: list[Load | None] = []
        self._parts: dict[str, list[Sequence[float]]] = defaultdict(list)

    def watch(self, plan: Plan) -> None:
        """The next plan."""
        self.kinds.append(kind_of(plan.num_prefill_tokens, plan.num_decode_tokens))
        self.depends_on.append(plan.depends_on)
        self.transfer_ns.append(self.cost.transfer_ns(plan))
        self._stage_ns.append(self.cost.stage_ns(plan))
        self._loads.append(self.cost.load(plan))
        self.gap_ns.append(self.cost.gap_ns(plan))
        for name, times in self.cost.components(plan).items():
            self._parts[name].append(times)

    @property
    def num_plans(self) -> int:
        """Plans seen."""
        return len(self.kinds)

    @property
    def stage_ns(self) -> Times:
        """(P, S) from start to end, after a rest where stages have clocks."""
        return np.array(self._stage_ns, dtype=np.int64).reshape(-1, self.cost.num_stages)

    def stretch_ns(self, start_ns: Times, end_ns: Times) -> Times:
        """(P, S) what clocks add to that, where the first plans start and end so."""
        found = np.zeros_like(start_ns)
        if self.cost.clock is None:
            return found
        for stage in range(found.shape[1]):
            clock, last_ns = StageClock(self.cost.clock), start_ns[:1, stage].sum()
            for number, load in enumerate(self._loads[: len(found)]):
                assert load is not None
                rested_ns, idle_ns = load.stage_ns[stage], int(start_ns[number, stage] - last_ns)
                took_ns = clock.step(idle_ns, rested_ns, load.stretched_ns[stage], load.power)
                found[number, stage], last_ns = took_ns - rested_ns, end_ns[number, stage]
        return found

    def parts_ns(self) -> dict[str, NDArray[np.float64]]:
        """(P, S) of each component that `stage_ns` has."""
        return {name: np.array(rows) for name, rows in self._parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageError:
    """One stage and one kind of micro-batch. Errors are percent of the measured time, summed over the batches."""

    stage: int
    kind: str
    num_batches: int
    measured_s: float
    predicted_s: float
    share: float  # of the stage's measured time
    error: float | None  # of the sum: signed, what it does to the run's length
    absolute_error: float | None  # of each batch, whatever its sign
    components_s: dict[str, float]  # of the prediction
    factors: dict[str, Factor]  # of these components, as the measured times have it


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitError:
    """Time beside the stages: medians over the places where it shows by itself."""

    name: str
    num_samples: int
    measured_ns: float | None
    predicted_ns: float | None

    @property
    def difference_ns(self) -> float | None:
        """Predicted less measured."""
        return None if self.measured_ns is None or self.predicted_ns is None else self.predicted_ns - self.measured_ns


def stage_errors(predictions: Predictions, record: RunRecord) -> list[StageError]:
    """For each stage its kinds of micro-batches, as far as there are any, then all of them."""
    size = min(predictions.num_plans, record.batches.size)
    start_ns, end_ns = record.stage_start_ns[:size], record.stage_end_ns[:size]
    stretch_ns = predictions.stretch_ns(start_ns, end_ns)
    measured, predicted = end_ns - start_ns, predictions.stage_ns[:size] + stretch_ns
    num_tokens = (record.batches["num_prefill_tokens"] + record.batches["num_decode_tokens"])[:size]
    masks = _masks(np.array(predictions.kinds[:size], dtype=np.int64), num_tokens)
    found, parts_ns = [], {name: rows[:size] for name, rows in predictions.parts_ns().items()}
    parts_ns["gemm"] = parts_ns["gemm"] + stretch_ns
    for stage in range(measured.shape[1]):
        for kind, mask in masks.items():
            if mask.any() or kind == ALL:
                times = measured[mask, stage], predicted[mask, stage]
                parts = {name: rows[mask, stage] for name, rows in parts_ns.items()}
                found.append(_stage_error(stage, kind, times, measured[:, stage].sum(), parts))
    return found


def _masks(kinds: Times, num_tokens: Times) -> dict[str, NDArray[np.bool_]]:
    """By kind, then the mixed ones by size where they are of more than one."""
    masks = {name: kinds == number for number, name in enumerate(KINDS)}
    is_mixed, sizes = masks["mixed"], np.searchsorted(MIXED_SIZES, num_tokens)
    names = [*(f"mixed, to {most:,}" for most in MIXED_SIZES), "mixed, longer"]
    by_size = {name: is_mixed & (sizes == number) for number, name in enumerate(names)}
    if sum(mask.any() for mask in by_size.values()) > 1:
        masks |= by_size
    return masks | {ALL: kinds >= 0}


def _stage_error(
    stage: int,
    kind: str,
    times: tuple[Times, Times],
    total_ns: int,
    parts_ns: dict[str, NDArray[np.float64]],
) -> StageError:
    measured, predicted = times
    components_s = {name: float(rows.sum()) / 1e9 for name, rows in parts_ns.items()}
    measured_ns, predicted_ns = int(measured.sum()), int(predicted.sum())
    off_ns = int(np.abs(predicted - measured).sum())
    return StageError(
        stage=stage,
        kind=kind,
        num_batches=measured.size,
        measured_s=measured_ns / 1e9,
        predicted_s=predicted_ns / 1e9,
        share=measured_ns / int(total_ns) if total_ns else 0.0,
        error=100 * (predicted_ns - measured_ns) / measured_ns if measured_ns else None,
        absolute_error=100 * off_ns / measured_ns if measured_ns else None,
        components_s={name: components_s[name] for name in COMPONENTS if components_s.get(name)},
        factors=component_factors(parts_ns, measured.astype(np.float64)),
    )


def wait_errors(predictions: Predictions, record: RunRecord) -> list[WaitError]:
    """Intake, transfer (of several stages), dispatch, return and gap."""
    size = min(predictions.num_plans, record.batches.size)
    return [
        _intake(predictions, record),
        *_transfers(predictions, record, size),
        *_host(predictions, record, size),
        *_gaps(predictions, record, size),
    ]


def _transfers(predictions: Predictions, record: RunRecord, size: int) -> Iterator[WaitError]:
    start, end = record.stage_start_ns[:size], record.stage_end_ns[:size]
    if start.shape[1] < 2 or not size:
        return
    waited = np.append(np.ones_like(end[:1, 1:], dtype=bool), end[:-1, 1:] <= end[1:, :-1], axis=0)
    predicted = np.array(predictions.transfer_ns[:size])[:, None].repeat(start.shape[1] - 1, axis=1)
    yield _median("transfer", (start[:, 1:] - end[:, :-1])[waited], predicted[waited])


def _intake(predictions: Predictions, record: RunRecord) -> WaitError:
    """Who comes while the pipeline has room is scheduled in a turn of its own."""
    scheduled_ns = record.requests["scheduled_ns"]
    is_own = (scheduled_ns >= 0) & ~np.isin(scheduled_ns, record.done_ns)
    waited = (scheduled_ns - record.requests["arrival_ns"])[is_own]
    return _median("intake", waited, np.full(waited.size, predictions.cost.intake_ns))


def _host(predictions: Predictions, record: RunRecord, size: int) -> Iterator[WaitError]:
    sent, done = record.batches["dispatched_ns"][:size], record.done_ns[:size]
    was_empty = np.append(True, done[:-1] <= sent[1:])[:size]
    is_alone = was_empty & np.append(sent[1:] >= done[:-1], True)[:size]
    to_start = record.stage_start_ns[:size, 0] - sent
    from_end = done - record.stage_end_ns[:size, -1]
    cost = predictions.cost
    yield _median("dispatch", to_start[was_empty], np.full(int(was_empty.sum()), cost.host_ns))
    yield _median("return", from_end[is_alone], np.full(int(is_alone.sum()), cost.return_ns))


def _gaps(predictions: Predictions, record: RunRecord, size: int) -> Iterator[WaitError]:
    """Between steps on stage 0, by what the second is: a decode step comes as a CUDA graph, any other does not."""
    start, end = record.stage_start_ns[1:size, 0], record.stage_end_ns[: max(size - 1, 0), 0]
    there_ns = record.batches["dispatched_ns"][1:size] + predictions.cost.host_ns
    depends_on = np.array(predictions.depends_on[1:size], dtype=np.int64)
    returned = np.where(depends_on >= 0, record.done_ns[depends_on], 0) if size > 1 else there_ns
    one_stage = record.stage_start_ns.shape[1] == 1  # then tokens are on their GPU already
    in_time = (there_ns <= end) & (one_stage | (returned <= end))
    is_decode = np.array(predictions.kinds[1:size], dtype=np.int64) == 0
    predicted = np.array(predictions.gap_ns[1:size], dtype=np.int64)
    for name, mask in (("gap before decodes", is_decode), ("gap before others", ~is_decode)):
        chosen = in_time & mask
        yield _median(name, (start - end)[chosen], predicted[chosen])


def _median(name: str, measured: Times, predicted: Times) -> WaitError:
    is_there = bool(measured.size)
    return WaitError(
        name=name,
        num_samples=int(measured.size),
        measured_ns=float(np.median(measured)) if is_there else None,
        predicted_ns=float(np.median(predicted)) if is_there else None,
    )
