"""Every metric of the simulated run beside the measured one's: its error, its noise, and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

from gllm.report.rows import LATENCIES, STATISTICS, show, show_bounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Summary = Mapping[str, Any]

DEFAULT_BAR = 2.0
"""Percent that a metric may be off."""

_TAIL = 2.0
"""Times the bar for what varies more: every p99, and the time to first token, which holds the waiting."""

_NOISE = 2.0
"""Times the spread of the recorded runs that is allowed besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measure: where a summary keeps it, and how far off it may be."""

    label: str
    path: tuple[str | int, ...]
    unit: str = "count"  # as in gllm.report.rows
    bars: float = 1.0  # times the bar; 0: shown, not judged

    def value(self, summary: Summary) -> Any:  # noqa: ANN401 - a JSON number or None
        """Look it up."""
        value: Any = summary
        for key in self.path:
            value = value[key]
        return value

    @property
    def name(self) -> str:
        """As `gllm.sim.intervals` names it."""
        return ".".join(map(str, self.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A metric of both bodies. Of a share, `error` and `spread` are points, else percent of the measured value."""

    label: str
    unit: str
    measured: float | None  # mean over the recorded runs
    simulated: float | None
    error: float | None  # simulated less measured
    spread: float | None  # largest less smallest of the recorded runs; None for a single one
    bar: float | None  # None: not judged
    passes: bool | None
    interval: tuple[float, float] | None = None  # where the measured value is predicted to be
    is_inside: bool | None = None  # whether it is there

    def cells(self) -> tuple[str, ...]:
        """As a table shows it: label, both values, error, spread, verdict."""
        end = " pt" if self.unit == "share" else " %"
        error = "–" if self.error is None else f"{self.error:+.2f}{end}"  # noqa: RUF001 - the typographic dash
        spread = "" if self.spread is None else f"{self.spread:.2f}{end}"
        verdict = {None: "", True: "yes", False: "NO"}[self.passes]
        return (self.label, *self._values(), error, spread, verdict)

    def interval_cells(self) -> tuple[str, ...]:
        """As a table of intervals shows it: label, both values, interval, whether the measured one is inside."""
        mark = {None: "", True: "yes", False: "NO"}[self.is_inside]
        return (self.label, *self._values(), show_bounds(self.interval, self.unit), mark)

    def _values(self) -> tuple[str, ...]:
        return tuple(show(_rounded(value, self.unit), self.unit) for value in (self.measured, self.simulated))


def compare_metrics(
    recorded: Sequence[Summary],
    simulated: Summary,
    bar: float,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> list[Compared]:
    """All metrics of one or more recorded runs and of the simulated one; `bar` in percent."""
    return [
        _compared(metric, recorded, simulated, bar, (intervals or {}).get(metric.name))
        for metric in _metrics(len(simulated["stages"]))
    ]


def _metrics(num_stages: int) -> Iterator[Metric]:
    for name, key in LATENCIES.items():
        for statistic in STATISTICS:
            bars = 0.0 if name == "queue" else _TAIL if name == "TTFT" or statistic == "p99" else 1.0
            yield Metric(label=f"{name} {statistic}", path=(key, statistic), unit="s", bars=bars)
    yield Metric(label="requests/s", path=("requests_per_s",), unit="rate")
    yield Metric(label="output tokens/s", path=("output_tokens_per_s",), unit="rate")
    yield Metric(label="duration", path=("duration_s",), unit="s")
    yield Metric(label="iterations", path=("num_iterations",))
    yield Metric(label="preemptions", path=("num_preemptions",))
    yield Metric(label="prefix-hit tokens", path=("num_cached_tokens",))
    yield Metric(label="KV blocks, peak", path=("num_peak_blocks",))
    yield Metric(label="tokens/batch, mean", path=("tokens_per_batch", "mean"), unit="rate")
    yield Metric(label="tokens/batch, std", path=("tokens_per_batch", "std"), unit="rate")
    for stage in range(num_stages):
        yield Metric(label=f"stage {stage} busy", path=("stages", stage, "busy_s"), unit="s")
    for stage in range(num_stages):
        yield Metric(label=f"stage {stage} bubbles", path=("stages", stage, "bubble_fraction"), unit="share")


def _compared(
    metric: Metric,
    recorded: Sequence[Summary],
    simulated: Summary,
    bar: float,
    interval: tuple[float, float] | None,
) -> Compared:
    values, found = [metric.value(summary) for summary in recorded], metric.value(simulated)
    is_known = None not in values
    mean = fsum(values) / len(values) if is_known else None
    error = None if mean is None or found is None else _off(found - mean, mean, metric.unit)
    spread = _off(max(values) - min(values), mean, metric.unit) if mean is not None and len(values) > 1 else None
    limit = bar * metric.bars if metric.bars and (mean, found) != (None, None) else None
    return Compared(
        label=metric.label,
        unit=metric.unit,
        measured=mean,
        simulated=found,
        error=error,
        spread=spread,
        bar=limit,
        passes=None if limit is None else error is not None and abs(error) <= max(limit, _NOISE * (spread or 0.0)),
        interval=interval,
        is_inside=None if mean is None or interval is None else interval[0] <= mean <= interval[1],
    )


def _off(difference: float, of: float, unit: str) -> float | None:
    """A difference in percent of a value, of a share in points; None: any difference from nothing."""
    if unit == "share":
        return 100 * difference
    if not of:
        return None if difference else 0.0
    return 100 * difference / of


def _rounded(value: float | None, unit: str) -> float | None:
    """Counts are whole, also those that are a mean of several runs."""
    return round(value) if unit == "count" and value is not None else value
