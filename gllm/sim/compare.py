"""`compare`: one trace under several policies at several rates, each run in a process of its own."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.console.output import COMPARISON_FILES, staged
from gllm.console.progress import show_progress
from gllm.console.runs import read_trace, tell
from gllm.console.terminal import say, say_json, say_table, warn
from gllm.policy import format_policy, parse_policy
from gllm.report.decision_log import LOG_NAME
from gllm.sim.options import num_jobs, sim_config, split_policies
from gllm.sim.processes import run_all
from gllm.sim.replay import config_trace, profile_notes, rejections, setup_notes
from gllm.trace import TraceError
from gllm.trace.shape import faster

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Mapping, Sequence

    from gllm.sim.config import SimConfig
    from gllm.trace import Trace, TraceOptions

    Summary = dict[str, Any]

NS_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a comparison."""

    config: SimConfig
    trace: Trace
    rate_per_s: float | None  # None: the trace as it is, all at once
    scale: float
    folder: Path | None  # where its report goes
    iterations: bool

    @property
    def name(self) -> str:
        """As the user knows the run; also its folder's name."""
        rate = "burst" if self.rate_per_s is None else f"{self.rate_per_s:g}"
        return re.sub(r"[^\w.,=@+-]", "_", f"{self.config.policy}@{rate}")

    def run(self) -> Summary:
        """Carry it out; its summary, as a comparison wants it."""
        from gllm.report.metrics import summarize  # noqa: PLC0415 - in the run's own process
        from gllm.report.write import write_run  # noqa: PLC0415
        from gllm.sim.run import simulate  # noqa: PLC0415

        config, folder = self.config, self.folder
        trace = replace(self.trace, requests=tuple(faster(self.trace.requests, self.scale)))
        log_path = folder / LOG_NAME if folder is not None and self.iterations else None
        record = simulate(config, trace, log_path=log_path)
        slo: Summary = {"slo_ttft_s": config.slo_ttft_s, "slo_tpot_s": config.slo_tpot_s}
        summary = summarize(record, **slo) if folder is None else write_run(folder, record, **slo)
        return {"policy": config.policy, "rate_per_s": self.rate_per_s, **summary}


def compare(args: Namespace) -> int:
    """Run all pairs of policy and rate, write the comparison, print it; return the exit status."""
    configs = [sim_config(args, policy) for policy in _policies(args.policies)]
    setups = [config.resolve() for config in configs]
    tell(args, setup_notes(setups[0]))
    trace = _read(args, config_trace(configs[0]))
    rates = _rates(args.rates, trace)
    if args.out is None:
        return _compared(args, _jobs(args, configs, trace, rates, None), None)
    with staged(Path(args.out), COMPARISON_FILES) as folder:
        return _compared(args, _jobs(args, configs, trace, rates, folder), folder)


def mean_rate(trace: Trace) -> float | None:
    """Arrivals per second over the trace; None where all come at once."""
    span_ns = trace.requests[-1].arrival_ns or 0
    return (len(trace.requests) - 1) * NS_PER_S / span_ns if span_ns else None


def _policies(texts: list[str]) -> list[str]:
    """Policy specs in their shortest form.

    Raises:
        ValueError: None or two of the same, or an unknown one.
    """
    specs = [format_policy(parse_policy(spec)) for spec in split_policies(texts)]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise ValueError(f"--policies: {twice} is named twice")
    if not specs:
        raise ValueError("--policies: names none")
    return specs


def _read(args: Namespace, options: TraceOptions) -> Trace:
    """The trace; with --rates, Poisson arrivals for one that has lengths only."""
    try:
        return read_trace(args, options)
    except TraceError:
        if args.rates is None or options.arrivals is not None or options.source == "-":
            raise
        try:
            trace = replace(options, arrivals="poisson:1").load()
        except TraceError:
            trace = None
        if trace is None:  # then it was not for want of arrival times
            raise
    tell(args, [f"{trace.name}: has no arrival times; Poisson arrivals are drawn for each rate"])
    return trace


def _rates(wanted: list[float] | None, trace: Trace) -> list[tuple[float | None, float]]:
    """Each rate, and how many times as fast the trace must go for it."""
    mean = mean_rate(trace)
    if wanted is None:
        return [(None if mean is None else float(f"{mean:.3g}"), 1.0)]
    if mean is None:
        raise ValueError("--rates: all requests of this trace arrive at once; spread them with --arrivals poisson:1")
    if len(set(wanted)) < len(wanted):
        raise ValueError("--rates: names a rate twice")
    return [(rate, rate / mean) for rate in wanted]


def _jobs(
    args: Namespace,
    configs: Iterable[SimConfig],
    trace: Trace,
    rates: Iterable[tuple[float | None, float]],
    folder: Path | None,
) -> list[Job]:
    jobs = []
    for (rate, scale), config in product(rates, configs):
        options = config_trace(config)
        scaled = replace(config, trace=replace(options, rate_scale=options.rate_scale * scale))
        job = Job(config=scaled, trace=trace, rate_per_s=rate, scale=scale, folder=None, iterations=args.iterations)
        jobs.append(job if folder is None else replace(job, folder=folder / "runs" / job.name))
    return jobs


def _compared(args: Namespace, jobs: Sequence[Job], folder: Path | None) -> int:
    num_processes = min(len(jobs), num_jobs(args))
    ended: list[str] = []
    with nullcontext() if args.quiet else show_progress(len(jobs), lambda: len(ended), what="runs"):
        outcomes = run_all(jobs, num_processes, ended)
    runs = [outcome for outcome in outcomes.values() if not isinstance(outcome, str)]
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            warn(f"error: {name}: {outcome}")
    if not runs:
        raise ValueError("no run succeeded, nothing to compare")
    tell(args, dict.fromkeys(note for run in runs for note in profile_notes(run)))
    _tell_rejections(args, jobs, outcomes)
    contents: Mapping[str, Any] = {"runs": runs}
    if folder is not None:
        from gllm.report.comparison import write_comparison  # noqa: PLC0415 - plots

        contents = write_comparison(folder, runs, title=f"{jobs[0].trace.name}: policies side by side")
    _print(args, runs, contents)
    return 2 if len(runs) < len(jobs) else 0


def _tell_rejections(args: Namespace, jobs: Iterable[Job], outcomes: Mapping[str, Summary | str]) -> None:
    for job in jobs:
        outcome = outcomes[job.name]
        if not isinstance(outcome, str):
            tell(args, (f"{job.name}: {note}" for note in rejections(job.config.resolve(), outcome)))


def _print(args: Namespace, runs: Sequence[Summary], contents: Mapping[str, Any]) -> None:
    if args.json:
        say_json(contents)
        return
    from gllm.report.comparison import by_rate, traffic_name  # noqa: PLC0415
    from gllm.report.table import comparison_table  # noqa: PLC0415

    for rate, group in by_rate(runs).items():
        labels = [str(run["policy"]).replace(":", ":\n").replace(",", ",\n") for run in group]  # columns are narrow
        say_table(comparison_table(group, labels, title=traffic_name(rate)))
    if args.out is not None:
        say(f"comparison {Path(args.out) / 'compare.html'}")
