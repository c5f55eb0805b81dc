"""The recorded runs that a comparison is about, and the simulator's configuration of the same run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gllm.console.output import TRACE_NAME
from gllm.gpu_names import gpu_name
from gllm.model_shape import ModelShape
from gllm.parallel import Parallel
from gllm.report.files import RECORD_NAME, REPORT_NAME
from gllm.report.metrics import has_status, summarize
from gllm.report.record_file import read_record
from gllm.sim.config import SimConfig
from gllm.sim.gpus import GPUS
from gllm.sim.recording import read_recording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gllm.report.record import RunRecord
    from gllm.sim.constants import RooflineConstants
    from gllm.sim.recording import Recording

_Value = TypeVar("_Value", ModelShape, Parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One folder: what its engine was told, and what was measured."""

    folder: Path
    recording: Recording
    record: RunRecord
    summary: Mapping[str, Any]


def read_runs(folders: Sequence[str]) -> list[RecordedRun]:
    """Read runs of one trace and configuration.

    Raises:
        ValueError: One line: a folder that cannot be read, or the first thing in which it differs from the first.
    """
    runs = [_read(Path(folder)) for folder in folders]
    for other in runs[1:]:
        _check_same(runs[0], other)
    return runs


def sim_config(run: RecordedRun, *, gpu: str | None, profile: str, constants: RooflineConstants) -> SimConfig:
    """The simulator's configuration of a recorded run.

    Args:
        run: whose model, layout, policy and limits.
        gpu: name of the GPU to simulate; None: the one that the run's device names.
        profile: whose times to use, as `SimConfig.profile` names it.
        constants: of the roofline.

    Raises:
        ValueError: One line: the run's report lacks something, or its device is no GPU that is known.
    """
    config, limits = run.record.config, run.recording.limits
    where = str(run.folder / REPORT_NAME)
    return SimConfig(
        model=_value(ModelShape, config, "model_shape", where),
        gpu=_gpu(config, profile, where) if gpu is None else gpu,
        parallel=_value(Parallel, config, "parallel", where),
        policy=run.recording.policy_spec,
        max_num_seqs=limits.max_num_seqs,
        block_size=limits.block_size,
        max_model_len=limits.max_model_len,
        num_blocks=limits.num_blocks,
        max_in_flight=limits.max_in_flight,
        prefix_caching=limits.prefix_caching,
        profile=profile,
        constants=constants,
    )


def _read(folder: Path) -> RecordedRun:
    recording, record = read_recording(folder), read_record(folder)
    if record.requests.size != len(recording.arrivals):
        counts = f"{RECORD_NAME} has {record.requests.size:,} requests, {TRACE_NAME} {len(recording.arrivals):,}"
        raise ValueError(f"{folder}: {counts}; they are not of one run")
    if recording.reported_sha256 != recording.sha256:
        raise ValueError(f"{folder}: the report's decisions are not those of its log; the files are not of one run")
    num_failed = int(has_status(record, "error").sum())
    if recording.num_unfinished or num_failed:
        what = f"{num_failed:,} failed" if num_failed else f"{recording.num_unfinished:,} had not ended"
        raise ValueError(f"{folder}: of its requests {what}; only --decisions compares such a run")
    return RecordedRun(
        folder=folder,
        recording=recording,
        record=record,
        summary=summarize(record, slo_ttft_s=None, slo_tpot_s=None),
    )


def _check_same(first: RecordedRun, other: RecordedRun) -> None:
    """See that the second run repeats the first. The cache may differ: its size follows from what memory was free."""
    pairs: dict[str, tuple[object, object]] = {
        name: (first.record.config.get(name), other.record.config.get(name))
        for name in ("model_shape", "gpus", "parallel")
    }
    ours, theirs = first.recording, other.recording
    same_blocks = replace(theirs.limits, num_blocks=ours.limits.num_blocks)
    pairs |= {
        "policy": (ours.policy_spec, theirs.policy_spec),
        "limits": (ours.limits, same_blocks),
        "trace": (ours.arrivals, theirs.arrivals),
    }
    differing = next((name for name, (one, two) in pairs.items() if one != two), None)
    if differing is not None:
        raise ValueError(
            f"{other.folder}: its {differing} is not that of {first.folder}; compare runs that were repeated"
        )


def _gpu(config: Mapping[str, Any], profile: str, where: str) -> str:
    """Name of the GPU whose data sheet the run's device has; of any, if a profile speaks for a device without one."""
    device = str(config.get("gpu", ""))
    name = gpu_name(device)
    if name is None and profile in {"auto", "none"}:
        raise ValueError(
            f"{where}: its gpu {device!r} is none that is known; name one with --gpu, or a profile with --profile"
        )
    return name or next(iter(GPUS))


def _value(kind: type[_Value], config: Mapping[str, Any], name: str, where: str) -> _Value:
    """A frozen value that the report holds; JSON has lists where it had tuples."""
    fields = config.get(name)
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {name} is missing; replay the run again")  # noqa: TRY004 - a user's file
    values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {name} is not whole ({error}); replay the run again") from None
