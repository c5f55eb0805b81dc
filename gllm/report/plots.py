"""The plots of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report import series
from gllm.report.metrics import finished_latencies, inter_token, kv_use
from gllm.report.rows import seconds
from gllm.report.style import (
    BLUE,
    DECODE,
    ENVELOPE,
    GREEN,
    HALF,
    INK,
    MUTED,
    PREFILL,
    RED,
    Chart,
    draw,
    legend_above,
    number_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gllm.report.record import RunRecord
    from gllm.report.rows import Summary
    from gllm.report.stats import Floats


def run_charts(record: RunRecord, summary: Summary) -> list[Chart]:
    """Every plot of a run, in reading order."""
    charts = [_latencies(record, summary)]
    if not record.batches.size:
        return [*charts, Chart(title="Pipeline", note="No micro-batch ran.")]
    return [
        *charts,
        _tokens(record),
        _token_distribution(record, summary),
        _bubbles(summary),
        _occupancy(record),
        _throughput(record),
        _queue(record),
        _cache(record),
    ]


def _latencies(record: RunRecord, summary: Summary) -> Chart:
    """Four small cumulative distributions side by side."""
    title = "How long users waited"
    latencies, (gaps, weights) = finished_latencies(record), inter_token(record)
    if not latencies["e2e_s"].size:
        return Chart(title=title, note="No request finished, so there is no latency to show.")
    goodput = summary["goodput"]
    panels = (
        ("Time to first token", latencies["ttft_s"], None, goodput["slo_ttft_s"]),
        ("Time per output token", latencies["tpot_s"], None, goodput["slo_tpot_s"]),
        ("Inter-token gap", gaps, weights, None),
        ("End to end", latencies["e2e_s"], None, None),
    )

    def paint(figure: Figure) -> None:
        for axes, (name, values, weight, slo_s) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
            axes.set_title(name)
            _cdf(axes, values, weight, slo_s)
        figure.axes[0].set_ylabel("share at or below, %")

    note = (
        "Cumulative distributions over finished requests (gaps: over all tokens). Dots mark p50, p90 and p99; "
        "a dashed line is the service level objective. Axes are logarithmic past a factor of 30 (lowest 0.5 % cut)."
    )
    return Chart(title=title, note=note, svg=draw("latency", paint, height=2.7))


def _cdf(axes: Axes, values: Floats, weights: Any, slo_s: float | None) -> None:  # noqa: ANN401 - an array or None
    """One distribution with its percentiles and its objective."""
    if not values.size:
        axes.text(0.5, 0.5, "no value", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_xticks([])
        return
    at, share = series.cdf(values, weights)
    unit, scale = ("ms", 1e3) if np.median(at) < 1 else ("s", 1.0)
    marks = [int(np.abs(share - quantile).argmin()) for quantile in (0.5, 0.9, 0.99)]
    axes.step(at * scale, share * 100, where="post", color=BLUE)
    axes.plot(at[marks] * scale, share[marks] * 100, "o", color=BLUE, markersize=4)
    if slo_s is not None:
        _objective(
            axes, slo_s * scale, met=share[np.searchsorted(at, slo_s, side="right") - 1] if slo_s >= at[0] else 0
        )
    low = at[np.searchsorted(share, 0.005)]
    if low > 0 and at[-1] > 30 * low:
        axes.set_xscale("log")
        axes.set_xlim(left=min(low, slo_s or low) * scale * 0.9)
    elif at[0] < 0.5 * at[-1]:
        axes.set_xlim(left=0)
    axes.set_ylim(0, 102)
    axes.set_xlabel(unit)
    number_axis(axes.xaxis)


def _objective(axes: Axes, at: float, *, met: float) -> None:
    """A dashed line, labelled on the side where the curve is not."""
    axes.axvline(at, color=RED, linestyle=(0, (4, 2)), linewidth=1.1)
    height, side, shift = (4, "right", -3) if met > 0.5 else (92, "left", 3)
    axes.annotate("SLO", (at, height), xytext=(shift, 0), textcoords="offset points", color=RED, ha=side)


def _tokens(record: RunRecord) -> Chart:
    """Tokens per micro-batch over time, prefill stacked on decode."""
    clock = series.clock(record)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        paint_tokens(axes, record, clock)
        legend_above(axes)

    size = _group_size(record)
    thinned = f"the mean of {size:,} consecutive micro-batches (grey: the largest of them)"
    note = f"Each step is {thinned if size > 1 else 'one micro-batch, held until the next'}. A pipeline wants it flat."
    return Chart(title="Tokens in each micro-batch", note=note, svg=draw("tokens", paint))


def paint_tokens(axes: Axes, record: RunRecord, clock: series.Clock) -> None:
    """Tokens per micro-batch over time; of a long run the means of consecutive ones."""
    rows, size = record.batches, _group_size(record)
    time = rows["dispatched_ns"][::size] / clock.ns_per_unit
    decode, _ = series.grouped(rows["num_decode_tokens"], size)
    prefill, _ = series.grouped(rows["num_prefill_tokens"], size)
    _, peak = series.grouped(rows["num_decode_tokens"] + rows["num_prefill_tokens"], size)
    time_end = np.append(time, record.done_ns.max(initial=0) / clock.ns_per_unit)
    layers = [np.append(layer, layer[-1]) for layer in (decode, decode + prefill, peak)]
    if size > 1:
        axes.step(time_end, layers[2], where="post", color=ENVELOPE, linewidth=0.7, label="largest batch")
    shape: dict[str, Any] = {"step": "post", "linewidth": 0}
    axes.fill_between(time_end, layers[0], layers[1], color=PREFILL, label="prefill", **shape)
    axes.fill_between(time_end, 0, layers[0], color=DECODE, label="decode", **shape)
    _over_time(axes, clock, "tokens per micro-batch")


def _group_size(record: RunRecord) -> int:
    """How many micro-batches one point of a time series stands for."""
    return -(-record.batches.size // series.MAX_POINTS)


def _token_distribution(record: RunRecord, summary: Summary) -> Chart:
    """Histograms of batch sizes, one a kind of cargo; laid over each other, for a logarithm cannot be stacked."""
    prefill, decode = record.batches["num_prefill_tokens"], record.batches["num_decode_tokens"]
    total = prefill + decode
    parts = {
        "decode only": (total[prefill == 0], DECODE),
        "mixed": (total[(prefill > 0) & (decode > 0)], GREEN),
        "prefill only": (total[(decode == 0) & (prefill > 0)], PREFILL),
    }
    parts = {name: part for name, part in parts.items() if part[0].size}
    edges = np.unique(np.linspace(0, total.max(initial=1) + 1, 61).round())
    shares = [np.histogram(values, edges)[0] * 100 / total.size for values, _ in parts.values()]
    smallest = min(share[share > 0].min() for share in shares)
    skewed = max(share.max() for share in shares) > 50 * smallest
    mean, std = (summary["tokens_per_batch"][name] for name in ("mean", "std"))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, (_, color)), share in zip(parts.items(), shares, strict=True):
            axes.stairs(share, edges, fill=True, color=color, alpha=0.45)
            axes.stairs(share, edges, color=color, label=name, linewidth=1.3)
        if skewed:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7 * smallest)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.set(xlabel="tokens per micro-batch", ylabel="share of micro-batches, %", xlim=(0, edges[-1]))
        axes.grid(visible=False, axis="x")
        number_axis(axes.xaxis)
        number_axis(axes.yaxis)
        legend_above(axes)

    note = f"Mean {mean:,.0f} (dashed), standard deviation {std:,.0f} tokens, over all {total.size:,} micro-batches."
    note += " The scale is logarithmic, so that rare sizes show." if skewed else ""
    svg = draw("distribution", paint, width=HALF, height=2.5)
    return Chart(title="How even the micro-batches are", note=note, svg=svg, wide=False)


def _bubbles(summary: Summary) -> Chart:
    """Idle share of each stage."""
    title, stages = "Pipeline bubbles by stage", summary["stages"]
    shares = [100 * (stage["bubble_fraction"] or 0) for stage in stages]
    if not shares:
        return Chart(title=title, note="The record holds no stage times.", wide=False)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(shares)), shares, height=0.62, color=BLUE)
        axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=4, color=INK)
        axes.set(xlabel="idle share of active time, %", xlim=(0, min(100, max(shares) * 1.2 + 1)), ylabel="stage")
        axes.set_yticks(range(len(shares)))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    note = "Time a stage had nothing to compute while at least one request was in the system."
    svg = draw("bubbles", paint, width=HALF, height=max(2.5, 0.18 * len(shares)))
    return Chart(title=title, note=note, svg=svg, wide=False)


def _occupancy(record: RunRecord) -> Chart:
    """Heat strips: a row a stage, a cell a slice of time."""
    title, clock = "When the stages were busy", series.clock(record, 400)
    num_stages = record.stage_start_ns.shape[1]
    if not num_stages:
        return Chart(title=title, note="The record holds no stage times.")
    share = series.occupancy(record, clock) * 100

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        extent = (clock.edges[0], clock.edges[-1], num_stages - 0.5, -0.5)
        style: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 100, "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(share, extent=extent, **style)
        figure.colorbar(image, ax=axes, label="busy, %", pad=0.01, aspect=12).outline.set_visible(False)
        axes.set(xlabel=f"time, {clock.unit}", ylabel="stage")
        axes.set_yticks(range(num_stages))
        axes.hlines(np.arange(num_stages - 1) + 0.5, *extent[:2], colors="white", linewidth=2.5)
        axes.grid(visible=False)

    note = f"Busy share of each stage in slices of {seconds(clock.width_s)}. Dark is working, white is idle."
    svg = draw("occupancy", paint, height=min(6.0, 1.2 + 0.26 * num_stages))
    return Chart(title=title, note=note, svg=svg)


def _throughput(record: RunRecord) -> Chart:
    """Computed tokens per second."""
    clock = series.clock(record, min(150, 10 + record.batches.size // 8))
    decode = series.per_second(record, record.batches["num_decode_tokens"], clock)
    prefill = series.per_second(record, record.batches["num_prefill_tokens"], clock)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs(decode + prefill, clock.edges, baseline=decode, fill=True, color=PREFILL, label="prefill")
        axes.stairs(decode, clock.edges, fill=True, color=DECODE, label="decode")
        _over_time(axes, clock, "tokens/s")
        legend_above(axes)

    note = f"Tokens of the micro-batches that ended in each slice of {seconds(clock.width_s)}, stacked."
    return Chart(title="Tokens computed per second", note=note, svg=draw("throughput", paint))


def _queue(record: RunRecord) -> Chart:
    """Requests waiting and running."""
    clock = series.clock(record)
    waiting, running = (
        series.held_mean(record, record.batches[name], clock) for name in ("num_waiting", "num_running")
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs(running, clock.edges, baseline=None, color=BLUE, label="running", linewidth=1.2)
        axes.stairs(waiting, clock.edges, baseline=None, color=RED, label="waiting", linewidth=1.2)
        _over_time(axes, clock, "requests")
        legend_above(axes)

    note = f"As the scheduler left them after each decision, averaged over slices of {seconds(clock.width_s)}."
    svg = draw("queue", paint, width=HALF, height=2.5)
    return Chart(title="Requests waiting and running", note=note, svg=svg, wide=False)


def _cache(record: RunRecord) -> Chart:
    """Share of the KV cache in use."""
    clock = series.clock(record)
    use = series.held_mean(record, kv_use(record), clock) * 100

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs(use, clock.edges, fill=True, color=GREEN, alpha=0.25)
        axes.stairs(use, clock.edges, baseline=None, color=GREEN, linewidth=1.2)
        _over_time(axes, clock, "blocks in use, %")
        axes.set_ylim(0, 102)

    note = f"Blocks of live sequences, mean over slices of {seconds(clock.width_s)}; reusable prefixes count as free."
    svg = draw("cache", paint, width=HALF, height=2.5)
    return Chart(title="KV cache in use", note=note, svg=svg, wide=False)


def _over_time(axes: Axes, clock: series.Clock, label: str) -> None:
    axes.set(xlabel=f"time, {clock.unit}", ylabel=label, xlim=(0, clock.edges[-1]))
    axes.set_ylim(bottom=0)
    number_axis(axes.yaxis)
