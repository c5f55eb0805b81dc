"""Arithmetic behind the measures: spreads, weighted percentiles, unions of intervals, step functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Intervals = NDArray[np.int64]
    """(N, 2) starts and ends in nanoseconds."""

PERCENTS = (50.0, 90.0, 99.0)
_NAMES = ("mean", "p50", "p90", "p99")


def spread(values: Floats) -> dict[str, float | None]:
    """Mean and percentiles (linear interpolation); every entry None when there is no value."""
    if not values.size:
        return dict.fromkeys(_NAMES)
    return _named(values.mean(), np.percentile(values, PERCENTS))


def weighted_spread(values: Floats, weights: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean and percentiles of a multiset that holds `values[i]` exactly `weights[i]` times."""
    if not weights.sum():
        return dict.fromkeys(_NAMES)
    return _named(np.average(values, weights=weights), weighted_percentile(values, weights, PERCENTS))


def weighted_percentile(values: Floats, weights: NDArray[np.int64], percents: Any) -> Floats:  # noqa: ANN401 - array-like
    """Percentiles by the inverse of the empirical distribution function.

    Equal to `np.percentile(np.repeat(values, weights), percents, method="inverted_cdf")`,
    without building the repeated array. The weights must not all be zero.
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    # numpy's own rounding (n * q - 1, then up), so that the two agree to the last bit
    rank = np.ceil(below[-1] * (np.asarray(percents) / 100.0) - 1.0).clip(min=0.0)
    found: Floats = values[order][np.searchsorted(below, rank, side="right")]
    return found


def mean_std(values: NDArray[Any]) -> dict[str, float | None]:
    """Mean and population standard deviation; None when there is no value."""
    if not values.size:
        return {"mean": None, "std": None}
    return {"mean": float(values.mean()), "std": float(values.std())}


def ratio(part: float, whole: float) -> float | None:
    """Part of a whole, or None when the whole is nothing."""
    return float(part) / float(whole) if whole else None


def union(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Intervals:
    """Merge intervals into disjoint ones, sorted by start; those that touch become one."""
    if not starts.size:
        return np.empty((0, 2), dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    left, right = starts[order], np.maximum.accumulate(ends[order])
    fresh = left[1:] > right[:-1]
    return np.stack([left[np.append(True, fresh)], right[np.append(fresh, True)]], axis=1)


def length_ns(intervals: Intervals) -> float:
    """Total length of disjoint intervals."""
    return float((intervals[:, 1] - intervals[:, 0]).sum())


def covered_ns(intervals: Intervals, instants: NDArray[Any]) -> Floats:
    """How much of the disjoint, sorted intervals lies before each instant: their running length."""
    if not intervals.size:
        return np.zeros(np.shape(instants))
    lengths = intervals[:, 1] - intervals[:, 0]
    after = np.cumsum(lengths)
    lengths_so_far: Floats = np.interp(instants, intervals.ravel(), np.stack([after - lengths, after], axis=1).ravel())
    return lengths_so_far


def overlap_ns(one: Intervals, other: Intervals) -> float:
    """Length of what two sets of disjoint, sorted intervals share."""
    reached = covered_ns(other, one)
    return float((reached[:, 1] - reached[:, 0]).sum())


def running_integral(values: Floats, knots: Floats, at: Floats) -> Floats:
    """Integral up to each `at` of the step function that holds `values[i]` from `knots[i]` to `knots[i + 1]`."""
    area = np.append(0.0, np.cumsum(values * np.diff(knots)))
    reached: Floats = np.interp(at, knots, area)
    return reached


def _named(mean: float, percentiles: Floats) -> dict[str, float | None]:
    return dict(zip(_NAMES, (float(mean), *map(float, percentiles)), strict=True))
