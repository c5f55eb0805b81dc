"""The comparison of the twins: three steps of decisions, then metrics, then where the error comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gllm.gpu_names import gpu_name
from gllm.report.metrics import plain, summarize
from gllm.sim.calibration import calibrate
from gllm.sim.fidelity.decisions import inject
from gllm.sim.fidelity.free import compare_free, free_summary, run_free
from gllm.sim.fidelity.metrics import compare_metrics
from gllm.sim.fidelity.stages import Predictions, stage_errors, wait_errors
from gllm.sim.intervals import predict_intervals

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
    from gllm.sim.intervals import Intervals

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
    intervals: Intervals | None  # None: the cost model has no checks to take any from
    stages: Sequence[StageError]
    waits: Sequence[WaitError]
    predictions: Predictions

    @property
    def passes(self) -> bool:
        """Whether decisions are equal wherever they must be, and no metric fails."""
        decisions = self.queued.is_equal is not False and all(each.is_equal for each in self.injected)
        return decisions and all(metric.passes is not False for metric in self.metrics)

    @property
    def simulated_with(self) -> str:
        """The cost model, and its GPU unless that is the device of a profile's times."""
        model, gpu = self.cost["cost_model"], self.cost["gpu"]
        _, comma, device = model.rpartition(", ")
        return model if comma and gpu_name(device) in {gpu, None} else f"{model}, {gpu}"

    @property
    def num_inside(self) -> tuple[int, int]:
        """How many measured values are in their prediction interval, and how many have one."""
        verdicts = [metric.is_inside for metric in self.metrics if metric.is_inside is not None]
        return verdicts.count(True), len(verdicts)

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
            "intervals": self._intervals_to_json(),
            "stages": [asdict(row) for row in self.stages],
            "waits": [asdict(row) for row in self.waits],
        }
        as_json: dict[str, Any] = plain(found)
        return as_json

    def _intervals_to_json(self) -> dict[str, Any] | None:
        """How they were made; the metrics hold them."""
        if self.intervals is None:
            return None
        num_inside, num_known = self.num_inside
        found = self.intervals.to_json() | {"num_inside": num_inside, "num_known": num_known}
        del found["measures"]
        return found


def compare(
    runs: Sequence[RecordedRun],
    setup: Setup,
    log_path: Path,
    *,
    bar: float,
    num_replicas: int = 0,
    num_processes: int = 1,
    quiet: bool = True,
) -> Comparison:
    """Compare recorded runs of one trace with what `setup` says; the simulated decisions go to `log_path`.

    `bar` is what a metric may be off, in percent. With replicas, metrics have prediction intervals, as far as the
    profile has checks.
    """
    first, predictions = runs[0], Predictions(setup.cost)
    injected = [inject(first.folder, first.recording, predictions.watch)]
    injected += [inject(run.folder, run.recording) for run in runs[1:]]
    record = run_free(first, setup.cost, log_path)
    summary = summarize(record, slo_ttft_s=None, slo_tpot_s=None)
    described = setup.to_json()  # now that the cost model has seen all micro-batches, and not yet those of replicas
    intervals = _intervals(first, setup, num_replicas, num_processes, quiet=quiet)
    measures = None if intervals is None else intervals.measures
    return Comparison(
        runs=runs,
        record=record,
        cost={key: described[key] for key in COST_KEYS if key in described},
        queued=_queued(first, record),
        injected=injected,
        free=compare_free(first, log_path),
        metrics=compare_metrics([run.summary for run in runs], summary, bar, measures),
        intervals=intervals,
        stages=stage_errors(predictions, first.record),
        waits=wait_errors(predictions, first.record),
        predictions=predictions,
    )


def _intervals(
    run: RecordedRun, setup: Setup, num_replicas: int, num_processes: int, *, quiet: bool
) -> Intervals | None:
    calibration = None if setup.profile is None or not num_replicas else calibrate(setup.profile)
    if calibration is None:
        return None
    return predict_intervals(
        partial(free_summary, run),
        setup.cost,
        calibration,
        num_replicas=num_replicas,
        num_processes=num_processes,
        quiet=quiet,
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
