"""`replay`: one trace under one policy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.console.output import RUN_FILES, staged
from gllm.console.progress import show_progress
from gllm.console.runs import read_trace, show_run, tell
from gllm.report.decision_log import LOG_NAME
from gllm.sim.options import num_jobs, sim_config
from gllm.sim.run import simulate

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from gllm.sim.calibration import Calibration
    from gllm.sim.config import Setup, SimConfig
    from gllm.sim.cost import CostModel
    from gllm.trace import Trace, TraceOptions

    Summary = dict[str, Any]


def replay(args: Namespace) -> int:
    """Replay a trace, write its report, print its table; return the exit status."""
    config = sim_config(args, args.policy)
    setup = config.resolve()  # before the trace is read: most mistakes show here
    calibration = _calibration(args, setup)
    if args.out is None:
        summary = _summary(args, setup, calibration)
    else:
        with staged(Path(args.out), RUN_FILES) as folder:
            summary = _written(args, setup, calibration, folder)
    tell(args, setup_notes(setup))
    tell(args, profile_notes(summary))
    tell(args, rejections(setup, summary))
    show_run(args, summary)
    return 0


def setup_notes(setup: Setup) -> Iterator[str]:
    """What a user may not expect of a configuration that is allowed."""
    trained, longest = setup.shape.max_position_embeddings, setup.limits.max_model_len
    if longest > trained:
        yield f"--max-model-len {longest:,} exceeds the {trained:,} positions of {setup.shape.name}; taken as scaled"
    profile = setup.profile
    if profile is not None:
        yield f"times are those of profile {profile.name}, made {profile.date} on {profile.device}"


def profile_notes(summary: Summary) -> list[str]:
    """Which times of a run were not the profile's own."""
    notes: list[str] = summary["config"].get("profile_notes", [])
    return notes


def rejections(setup: Setup, summary: Summary) -> Iterator[str]:
    """How many requests were never served, why, and what to do."""
    limits, rejected, total = setup.limits, summary["num_rejected"], summary["num_requests"]
    longest = limits.max_tokens_per_sequence
    if longest == limits.max_model_len:
        cause = "that --max-model-len allows"
    else:
        cause = "of the whole KV cache; raise --num-blocks, or spread the model over more GPUs"
    if rejected:
        yield f"{rejected:,} of {total:,} requests rejected: prompts too long for the {longest:,} tokens {cause}"


def _summary(args: Namespace, setup: Setup, calibration: Calibration | None) -> Summary:
    """Of a run that leaves no files."""
    config = setup.config
    trace = read_trace(args, config_trace(config))
    progress = None if args.quiet else show_progress
    record = simulate(config, trace, digest=args.iterations, progress=progress)
    from gllm.report.metrics import summarize  # noqa: PLC0415

    summary = summarize(record, slo_ttft_s=config.slo_ttft_s, slo_tpot_s=config.slo_tpot_s)
    intervals = _intervals(args, setup, calibration, trace)
    return summary if intervals is None else {**summary, "intervals": intervals}


def _written(args: Namespace, setup: Setup, calibration: Calibration | None, folder: Path) -> Summary:
    """Of a run whose report goes into `folder`."""
    config = setup.config
    trace = read_trace(args, config_trace(config))
    progress = None if args.quiet else show_progress
    log_path = folder / LOG_NAME if args.iterations else None
    record = simulate(config, trace, log_path=log_path, progress=progress)
    intervals = _intervals(args, setup, calibration, trace)
    from gllm.report.write import write_run  # noqa: PLC0415 - pandas and plots, which only now are needed

    slo: Summary = {"slo_ttft_s": config.slo_ttft_s, "slo_tpot_s": config.slo_tpot_s}
    return write_run(folder, record, **slo, intervals=intervals)


def _calibration(args: Namespace, setup: Setup) -> Calibration | None:
    """What prediction intervals are taken from; None where none are asked for."""
    if not (args.intervals or args.replicas):
        return None
    from gllm.sim.intervals import calibration_of  # noqa: PLC0415

    return calibration_of(setup)


def _intervals(args: Namespace, setup: Setup, calibration: Calibration | None, trace: Trace) -> Summary | None:
    """As a report holds them."""
    if calibration is None:
        return None
    from gllm.sim.intervals import predict_intervals  # noqa: PLC0415

    found = predict_intervals(
        partial(simulated_summary, setup.config, trace),
        setup.cost,
        calibration,
        num_replicas=args.replicas or args.intervals,
        seed=args.seed,
        num_processes=num_jobs(args),
        quiet=args.quiet,
    )
    return found.to_json()


def simulated_summary(config: SimConfig, trace: Trace, cost: CostModel) -> Summary:
    """Of a run whose steps take what `cost` says; no log, no progress."""
    from gllm.report.metrics import summarize  # noqa: PLC0415

    record = simulate(config, trace, cost=cost)
    return summarize(record, slo_ttft_s=config.slo_ttft_s, slo_tpot_s=config.slo_tpot_s)


def config_trace(config: SimConfig) -> TraceOptions:
    """The trace that a command line always names."""
    assert config.trace is not None
    return config.trace
