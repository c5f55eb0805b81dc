"""The plots of two runs of one trace, and of stage times as predicted and as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gllm.report import series
from gllm.report.metrics import finished_latencies, horizon_ns
from gllm.report.plots import paint_tokens
from gllm.report.style import HALF, INK, MUTED, SERIES, Chart, draw, legend_above, number_axis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from gllm.report.record import RunRecord
    from gllm.report.stats import Floats

_LATENCIES = {"Time to first token": "ttft_s", "Time per output token": "tpot_s", "End to end": "e2e_s"}
_LINES = ("-", (0, (4, 1.5)))
_MAX_DOTS = 1500
"""Dots of one kind in a scatter plot; of more a regular sample is drawn."""


def latency_chart(runs: Mapping[str, RunRecord]) -> Chart:
    """Cumulative distributions of the runs, by name, laid over each other."""
    latencies = {name: finished_latencies(record) for name, record in runs.items()}

    def paint(figure: Figure) -> None:
        for axes, (title, key) in zip(
            figure.subplots(1, len(_LATENCIES), sharey=True), _LATENCIES.items(), strict=True
        ):
            axes.set_title(title)
            _cdfs(axes, {name: columns[key] for name, columns in latencies.items()})
        figure.axes[0].set_ylabel("share at or below, %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(runs))

    note = "Cumulative distributions over finished requests. Axes are logarithmic past a factor of 30."
    return Chart(title="How long users waited", note=note, svg=draw("latency", paint, height=2.9))


def _cdfs(axes: Axes, columns: Mapping[str, Floats]) -> None:
    known = [values for values in columns.values() if values.size]
    unit, scale = ("ms", 1e3) if known and np.median(known[0]) < 1 else ("s", 1.0)
    for index, (name, values) in enumerate(columns.items()):
        at, share = series.cdf(values) if values.size else (values, values)
        axes.step(at * scale, share * 100, where="post", color=SERIES[index], linestyle=_LINES[index], label=name)
    lows, highs = [values.min() for values in known], [values.max() for values in known]
    if known and 0 < 30 * min(lows) < max(highs):
        axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_xlabel(unit)
    number_axis(axes.xaxis)


def token_chart(runs: Mapping[str, RunRecord]) -> Chart:
    """Tokens per micro-batch over time, a panel a run, on one clock."""
    title = "Tokens in each micro-batch"
    if not all(record.batches.size for record in runs.values()):
        return Chart(title=title, note="No micro-batch ran.")
    clock = series.clock(max(runs.values(), key=horizon_ns))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(runs), 1, sharex=True, sharey=True)
        for axes, (name, record) in zip(panels, runs.items(), strict=True):
            paint_tokens(axes, record, clock)
            axes.set_title(name)
            axes.label_outer()
        legend_above(panels[0])

    note = "Of long runs the means of consecutive micro-batches (grey: the largest of them)."
    return Chart(title=title, note=note, svg=draw("tokens", paint, height=4.4))


def stage_time_chart(
    predicted_ns: NDArray[np.int64], measured_ns: NDArray[np.int64], kinds: NDArray[np.int64], names: Sequence[str]
) -> Chart:
    """Stage times (B, S) against each other; `kinds` (B,) tells which of `names` a micro-batch is."""
    title = "Stage times, predicted and measured"
    if not measured_ns.size:
        return Chart(title=title, note="The record holds no stage times.", wide=False)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, name in enumerate(names):
            measured, predicted = (
                _sample(times[kinds == number].ravel()) / 1e6 for times in (measured_ns, predicted_ns)
            )
            if measured.size:
                axes.plot(
                    measured,
                    predicted,
                    "o",
                    color=SERIES[number],
                    markersize=3,
                    markeredgewidth=0,
                    alpha=0.6,
                    label=name,
                )
        low, high = _span_ms(measured_ns, predicted_ns)
        axes.plot((low, high), (low, high), color=INK, linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
        number_axis(axes.xaxis)
        number_axis(axes.yaxis)
        legend_above(axes)

    note = "A dot a micro-batch and stage; on the line the two agree. A regular sample where there are many."
    return Chart(title=title, note=note, svg=draw("stage-times", paint, width=HALF, height=3.6), wide=False)


def stage_error_chart(
    predicted_ns: NDArray[np.int64], measured_ns: NDArray[np.int64], kinds: NDArray[np.int64], names: Sequence[str]
) -> Chart:
    """Distribution of the relative errors of stage times (B, S), a curve a kind."""
    title = "Errors of single stage times"
    if not measured_ns.size:
        return Chart(title=title, note="The record holds no stage times.", wide=False)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, name in enumerate(names):
            measured, predicted = (times[kinds == number].ravel() for times in (measured_ns, predicted_ns))
            errors = 100 * (predicted - measured)[measured > 0] / measured[measured > 0]
            if errors.size:
                at, share = series.cdf(errors)
                axes.step(at, share * 100, where="post", color=SERIES[number], label=name)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set(xlabel="predicted less measured, %", ylabel="share at or below, %", ylim=(0, 102))
        number_axis(axes.xaxis)
        legend_above(axes)

    note = "Cumulative distribution over micro-batches and stages."
    return Chart(title=title, note=note, svg=draw("stage-errors", paint, width=HALF, height=3.6), wide=False)


def _sample(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return values[:: -(-values.size // _MAX_DOTS) or 1]


def _span_ms(*columns: NDArray[np.int64]) -> tuple[float, float]:
    """Smallest and largest positive time."""
    times = np.concatenate([column.ravel() for column in columns])
    times = times[times > 0]
    return (float(times.min()) / 1e6, float(times.max()) / 1e6) if times.size else (1.0, 1.0)
