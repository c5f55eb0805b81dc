"""The comparison of the twins: three steps of decisions, then metrics, then where the error comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gllm.report.metrics import plain, summarize
from gllm.sim.fidelity.decisions import inject
from gllm.sim.fidelity.free import compare_free, run_free
from gllm.sim.fidelity.metrics import compare_metrics
from gllm.sim.fidelity.stages import Predictions, stage_errors, wait_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gllm.report.record import RunRecord
    from gllm.sim.config import Setup
    from gllm.sim.fidelity.decisions import Injected
    from gllm.sim.fidelity.free import FreeDecisions
    from gllm.sim.fidelity.metrics import Compared
    from gllm.sim.fidelity.runs import RecordedRun
    from gllm.sim.fidelity.stages import StageError, WaitError

COST_KEYS = ("cost_model", "gpu", "profile_residuals", "profile_notes", "cost_constants")


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Digests of the decisions where no time is injected and none matters: all requests are there from the start."""

    why_not: str | None  # it does not apply
    recorded: str
    simulated: str

    @property
    def is_equal(self) -> bool | None:
        """Whether they are; None where that does not apply."""
        return None if self.why_not is not None else self.recorded == self.simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that was found of recorded runs and their simulation; of several runs the first is the one looked into."""

    runs: Sequence[RecordedRun]
    record: RunRecord  # of the free simulation
    cost: Mapping[str, Any]  # where its times come from
    queued: Queued
    injected: Sequence[Injected]  # one a run
    free: FreeDecisions
    metrics: Sequence[Compared]
    stages: Sequence[StageError]
    waits: Sequence[WaitError]
    predictions: Predictions

    @property
    def passes(self) -> bool:
        """Whether decisions are equal wherever they must be, and no metric fails."""
        decisions = self.queued.is_equal is not False and all(each.is_equal for each in self.injected)
        return decisions and all(metric.passes is not False for metric in self.metrics)

    def to_json(self) -> dict[str, Any]:
        """Everything but the columns."""
        config = self.runs[0].record.config
        found = {
            "runs": [str(run.folder) for run in self.runs],
            "passes": self.passes,
            "model": config.get("model"),
            "gpus": config.get("gpus"),
            "policy": config.get("policy"),
            "trace": config.get("trace"),
            "cost": self.cost,
            "decisions": {
                "queued": asdict(self.queued) | {"is_equal": self.queued.is_equal},
                "injected": [asdict(each) for each in self.injected],
                "free": self.free._asdict(),
            },
            "metrics": [asdict(metric) for metric in self.metrics],
            "stages": [asdict(row) for row in self.stages],
            "waits": [asdict(row) for row in self.waits],
        }
        as_json: dict[str, Any] = plain(found)
        return as_json


def compare(runs: Sequence[RecordedRun], setup: Setup, log_path: Path, *, bar: float) -> Comparison:
    """Compare recorded runs of one trace with what `setup` says; the simulated decisions go to `log_path`.

    `bar` is what a metric may be off, in percent.
    """
    first, predictions = runs[0], Predictions(setup.cost)
    injected = [inject(first.folder, first.recording, predictions.watch)]
    injected += [inject(run.folder, run.recording) for run in runs[1:]]
    record = run_free(first, setup.cost, log_path)
    summary = summarize(record, slo_ttft_s=None, slo_tpot_s=None)
    described = setup.to_json()  # now that the cost model has seen all micro-batches
    return Comparison(
        runs=runs,
        record=record,
        cost={key: described[key] for key in COST_KEYS if key in described},
        queued=_queued(first, record),
        injected=injected,
        free=compare_free(first, log_path),
        metrics=compare_metrics([run.summary for run in runs], summary, bar),
        stages=stage_errors(predictions, first.record),
        waits=wait_errors(predictions, first.record),
        predictions=predictions,
    )


def _queued(run: RecordedRun, record: RunRecord) -> Queued:
    recording = run.recording
    why_not = None
    if len({arrival.request.arrival_ns for arrival in recording.arrivals}) > 1:
        why_not = "requests arrive over time"
    elif any(moment.aborted for moment in recording.moments):
        why_not = "clients aborted requests"
    assert record.decision_sha256 is not None
    return Queued(why_not=why_not, recorded=recording.sha256, simulated=record.decision_sha256)
