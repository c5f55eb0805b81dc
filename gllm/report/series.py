"""Columns of a run thinned out to what a plot can show, without changing what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.metrics import NS_PER_S, held_integral, horizon_ns, stage_busy
from gllm.report.stats import covered_ns, weighted_percentile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gllm.report.record import RunRecord
    from gllm.report.stats import Floats

MAX_POINTS = 600
"""Points a time series is drawn with: one to about two pixels of a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Equal bins over the run, and the unit its time axis is labelled in."""

    edges_ns: Floats  # (N + 1,)
    unit: str
    ns_per_unit: float

    @property
    def edges(self) -> Floats:
        """Bin edges in the axis' unit."""
        return self.edges_ns / self.ns_per_unit

    @property
    def width_s(self) -> float:
        """Width of a bin in seconds."""
        return float(self.edges_ns[1] - self.edges_ns[0]) / NS_PER_S


def clock(record: RunRecord, num_bins: int = MAX_POINTS) -> Clock:
    """Bins from the run's start to its last instant; seconds, minutes or hours as its length asks for."""
    end_ns = max(horizon_ns(record), 1)
    unit, ns = next((u, n) for u, n, limit in _UNITS if end_ns < limit)
    return Clock(edges_ns=np.linspace(0, end_ns, num_bins + 1), unit=unit, ns_per_unit=ns)


_UNITS = (("s", 1e9, 1.2e12), ("min", 6e10, 1.8e13), ("h", 3.6e12, np.inf))


def held_mean(record: RunRecord, column: NDArray[Any], at: Clock) -> Floats:
    """Mean over each bin of a batch column that holds until the next dispatch; 0 while nobody is in the system."""
    return np.diff(held_integral(record, column.astype(np.float64), at.edges_ns)) / np.diff(at.edges_ns)


def occupancy(record: RunRecord, at: Clock) -> Floats:
    """Busy share (S, N) of each stage in each bin."""
    stages = range(record.stage_start_ns.shape[1])
    return np.stack([np.diff(covered_ns(stage_busy(record, s), at.edges_ns)) for s in stages]) / np.diff(at.edges_ns)


def per_second(record: RunRecord, tokens: NDArray[Any], at: Clock) -> Floats:
    """Tokens of the batches that ended in each bin, per second."""
    return np.histogram(record.done_ns, bins=at.edges_ns, weights=tokens)[0] / at.width_s


def grouped(column: NDArray[Any], size: int) -> tuple[Floats, Floats]:
    """Mean and maximum of every `size` consecutive entries; the last group may be smaller."""
    starts = np.arange(0, column.size, size)
    counts = np.diff(np.append(starts, column.size))
    return np.add.reduceat(column, starts) / counts, np.maximum.reduceat(column, starts).astype(np.float64)


def cdf(values: Floats, weights: NDArray[np.int64] | None = None, num_points: int = 240) -> tuple[Floats, Floats]:
    """Quantiles of (weighted) values and their shares, at most `num_points`, both ends included.

    Half of the points lie in the top tenth, where a tail shows.
    """
    half = num_points // 2
    percents = np.union1d(np.linspace(0, 100, half), np.linspace(90, 100, half))
    if weights is None:
        weights = np.ones(values.size, dtype=np.int64)
    return weighted_percentile(values, weights, percents), percents / 100
