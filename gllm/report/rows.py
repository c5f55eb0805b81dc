"""Which measures are shown, in which unit, and which direction is better: shared by terminal and pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Summary = Mapping[str, Any]

MISSING = "–"  # noqa: RUF001 - the typographic dash


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure: where a summary keeps it and how it reads."""

    label: str
    path: tuple[str, ...]
    unit: str = "count"  # a key of _FORMATS
    better: str = ""  # "low", "high" or "" where neither is

    def value(self, summary: Summary) -> Any:  # noqa: ANN401 - any JSON scalar
        """Look the measure up; None when the summary lacks it."""
        return lookup(summary, self.path)

    def text(self, summary: Summary) -> str:
        """The measure as a reader sees it."""
        return show(self.value(summary), self.unit)


SECTIONS: dict[str, tuple[Row, ...]] = {
    "Traffic": (
        Row(label="requests", path=("num_requests",)),
        Row(label="finished", path=("num_finished",)),
        Row(label="rejected", path=("num_rejected",)),
        Row(label="aborted", path=("num_aborted",)),
        Row(label="failed", path=("num_failed",)),
        Row(label="unfinished", path=("num_unfinished",)),
        Row(label="duration", path=("duration_s",), unit="s"),
        Row(label="wall time", path=("wall_s",), unit="s"),
    ),
    "Throughput": (
        Row(label="requests/s", path=("requests_per_s",), unit="rate", better="high"),
        Row(label="output tokens/s", path=("output_tokens_per_s",), unit="rate", better="high"),
        Row(label="total tokens/s", path=("total_tokens_per_s",), unit="rate", better="high"),
        Row(label="goodput, requests/s", path=("goodput", "requests_per_s"), unit="rate", better="high"),
        Row(label="SLO attainment", path=("goodput", "attainment"), unit="share", better="high"),
    ),
    "Pipeline": (
        Row(label="micro-batches", path=("num_iterations",)),
        Row(label="bubble share", path=("bubble_fraction",), unit="share", better="low"),
        Row(label="tokens/batch, mean", path=("tokens_per_batch", "mean"), unit="rate"),
        Row(label="tokens/batch, std", path=("tokens_per_batch", "std"), unit="rate", better="low"),
        Row(label="prefill/batch, mean", path=("prefill_tokens_per_batch", "mean"), unit="rate"),
        Row(label="prefill/batch, std", path=("prefill_tokens_per_batch", "std"), unit="rate"),
        Row(label="decode/batch, mean", path=("decode_tokens_per_batch", "mean"), unit="rate"),
        Row(label="decode/batch, std", path=("decode_tokens_per_batch", "std"), unit="rate"),
        Row(label="discarded tokens", path=("num_discarded_tokens",), better="low"),
    ),
    "Cache": (
        Row(label="prefix hit rate", path=("prefix_hit_rate",), unit="share", better="high"),
        Row(label="KV use, mean", path=("kv_use", "mean"), unit="share"),
        Row(label="KV use, peak", path=("kv_use", "peak"), unit="share"),
        Row(label="preemptions", path=("num_preemptions",), better="low"),
    ),
}
"""Measures with one value each."""

LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "ITL": "itl_s", "E2E": "e2e_s", "queue": "queue_s"}
STATISTICS = ("mean", "p50", "p90", "p99")

COMPARED: tuple[Row, ...] = (
    Row(label="finished", path=("num_finished",), better="high"),
    *SECTIONS["Throughput"],
    *(
        Row(label=f"{name} {statistic}", path=(key, statistic), unit="s", better="low")
        for name, key in LATENCIES.items()
        for statistic in ("mean", "p50", "p99")
    ),
    *SECTIONS["Pipeline"][:4],
    *SECTIONS["Cache"],
)
"""What a comparison sets side by side."""


def lookup(summary: Summary, path: Iterable[str]) -> Any:  # noqa: ANN401 - any JSON value
    """Follow keys into nested mappings; None where one is missing."""
    value: Any = summary
    for key in path:
        value = value.get(key) if hasattr(value, "get") else None
    return value


def bounds(summary: Summary, path: Sequence[str]) -> tuple[float, float] | None:
    """The prediction interval of a measure; None where the summary has none, or there is but the value itself."""
    pair = lookup(summary, ("intervals", "measures", ".".join(path)))
    return None if pair is None or pair[0] == pair[1] == lookup(summary, path) else (pair[0], pair[1])


def show_bounds(pair: tuple[float, float] | None, unit: str) -> str:
    """Format an interval; nothing for None."""
    return "" if pair is None else " to ".join(show(round(end) if unit == "count" else end, unit) for end in pair)


def intervals_note(summary: Summary) -> str:
    """What the prediction intervals of a summary are, in a line; nothing where it has none."""
    found = summary.get("intervals")
    if found is None:
        return ""
    checks = "; ".join(
        f"{kind} {each['mean']:.3f} ± {each['standard_error']:.3f} of {each['num_checks']}"
        for kind, each in found["checks"].items()
    )
    return (
        f"{found['level']:.0%} intervals by {found['num_replicas']} replicas that err like the profile's checks; "
        f"these, measured by predicted: {checks}"
    )


def best(values: Sequence[Any], better: str) -> set[int]:
    """Positions of the best value, ties included; none when nothing tells the values apart."""
    known = [value for value in values if value is not None]
    if not better or len(set(known)) < 2:
        return set()
    top = min(known) if better == "low" else max(known)
    return {index for index, value in enumerate(values) if value == top}


def show(value: float | None, unit: str) -> str:
    """Format a value in one of the units s, count, rate, share."""
    return MISSING if value is None else _FORMATS[unit](value)


def seconds(value: float) -> str:
    """Three significant digits, in the unit that suits: us, ms, s, min or h."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36e3, 1 / 60, "min")):
        if abs(value) < limit:
            return f"{significant(value * factor)} {unit}"
    return f"{significant(value / 3600)} h"


def significant(value: float) -> str:
    """Three significant digits without an exponent, thousands separated."""
    size = abs(value)
    digits = 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


_FORMATS = {
    "s": seconds,
    "count": "{:,}".format,
    "rate": significant,
    "share": "{:.1%}".format,
}
