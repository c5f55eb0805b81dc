"""The plots of a comparison: curves over the request rate, or bars where there is a single rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.rows import lookup, show
from gllm.report.style import BLUE, HALF, INK, MARKERS, SERIES, SKY, Chart, draw, number_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gllm.report.rows import Summary

LATENCIES = {
    "Time to first token": "ttft_s",
    "Time per output token": "tpot_s",
    "End to end": "e2e_s",
}
MEASURES: dict[str, tuple[tuple[str, ...], str, float, str]] = {
    "Output throughput": (("output_tokens_per_s",), "tokens/s", 1.0, "Output tokens of finished requests per second."),
    "Requests within their objectives": (
        ("goodput", "attainment"),
        "share of requests, %",
        100.0,
        "Share of all requests that finished within the TTFT and TPOT objectives; one not given counts as met.",
    ),
    "Pipeline bubbles": (
        ("bubble_fraction",),
        "idle share, %",
        100.0,
        "Idle share of the stages while a request was in the system, mean over the stages. Lower is better.",
    ),
    "Unevenness of micro-batches": (
        ("tokens_per_batch", "std"),
        "standard deviation, tokens",
        1.0,
        "Standard deviation of the tokens per micro-batch. Lower is better: uneven batches make bubbles.",
    ),
}


def comparison_charts(runs: Sequence[Summary]) -> list[Chart]:
    """All plots of a comparison."""
    policies = {policy: [run for run in runs if run["policy"] == policy] for policy in {r["policy"]: 0 for r in runs}}
    swept = len({run["rate_per_s"] for run in runs}) > 1
    latency = _latency_curves(policies) if swept else _latency_bars(policies)
    known = [title for title, (path, *_) in MEASURES.items() if any(lookup(run, path) is not None for run in runs)]
    return [latency, *(_measure(policies, title, swept=swept) for title in known)]


def _latency_curves(policies: dict[str, list[Summary]]) -> Chart:
    """Mean above, p99 below, a column a latency."""

    def paint(figure: Figure) -> None:
        grid = figure.subplots(2, len(LATENCIES), sharex=True)
        for column, (name, key) in enumerate(LATENCIES.items()):
            for axes, statistic in zip(grid[:, column], ("mean", "p99"), strict=True):
                axes.set_title(f"{name}, {statistic}")
                _curves(axes, policies, (key, statistic), 1.0, "s")
            grid[1, column].set_xlabel("offered load, requests/s")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=min(len(labels), 5))

    note = "Latency of finished requests against the offered rate. Lower is better; logarithmic past a factor of 30."
    return Chart(title="Latency under load", note=note, svg=draw("latency", paint, height=4.6))


def _latency_bars(policies: dict[str, list[Summary]]) -> Chart:
    """A panel a latency, mean and p99 of every policy."""

    def paint(figure: Figure) -> None:
        row = figure.subplots(1, len(LATENCIES), sharey=True)
        for axes, (name, key) in zip(row, LATENCIES.items(), strict=True):
            axes.set_title(name)
            _bars(axes, policies, {"mean": (key, "mean"), "p99": (key, "p99")}, "s")
            axes.set_xlabel("s")
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2)

    height = 1.3 + 0.42 * len(policies)
    note = "Latency of finished requests, mean and 99th percentile. Lower is better."
    return Chart(title="Latency", note=note, svg=draw("latency", paint, height=height))


def _measure(policies: dict[str, list[Summary]], title: str, *, swept: bool) -> Chart:
    """One measure in half a page's width."""
    path, label, scale, note = MEASURES[title]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if swept:
            _curves(axes, policies, path, scale, label)
            axes.set_xlabel("offered load, requests/s")
            axes.legend(loc="best", fontsize=7.5)
        else:
            _bars(axes, policies, {"": path}, "share" if scale == 100 else "rate", scale)
            axes.set_xlabel(label)

    height = 2.8 if swept else 1.0 + 0.3 * len(policies)
    name = "-".join(path).replace("_", "-")
    return Chart(title=title, note=note, svg=draw(name, paint, width=HALF, height=height), wide=False)


def _curves(axes: Axes, policies: dict[str, list[Summary]], path: tuple[str, ...], scale: float, label: str) -> None:
    """One line a policy over the rate; colour and marker tell them apart."""
    drawn = []
    for index, (policy, runs) in enumerate(policies.items()):
        pairs = [(run["rate_per_s"], lookup(run, path)) for run in runs]
        known = [(rate, value * scale) for rate, value in pairs if value is not None]
        drawn += [value for _, value in known]
        look: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*np.array(known).reshape(-1, 2).T, markersize=4.5, label=str(policy), **look)
    if label == "s" and drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(drawn, default=1) or 1)
    axes.set_ylabel(label)
    number_axis(axes.yaxis)


def _bars(
    axes: Axes, policies: dict[str, list[Summary]], paths: dict[str, tuple[str, ...]], unit: str, scale: float = 1.0
) -> None:
    """Horizontal bars, a group a policy, a bar a path, each with its value."""
    places, height = np.arange(len(policies)), 0.76 / len(paths)
    for index, (name, path) in enumerate(paths.items()):
        values = [lookup(runs[0], path) for runs in policies.values()]
        lengths = [(value or 0.0) * scale for value in values]
        offset = (index - (len(paths) - 1) / 2) * height
        bars = axes.barh(places + offset, lengths, height * 0.92, color=(BLUE, SKY)[index], label=name)
        axes.bar_label(bars, [show(value, unit) for value in values], padding=3, color=INK, fontsize=7.5)
    axes.set_yticks(places, list(map(str, policies)))
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    number_axis(axes.xaxis)
