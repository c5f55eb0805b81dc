"""Measured tables and what lies between their points; beyond them, in proportion to a figure that is known everywhere.

Between points a time is linear in each direction. Beyond the last (or before the first) point it is the time at the
nearest point, times the figure wanted over the figure there; whoever asks is told of each such direction.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from gllm.graph_sizes import as_measured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FEWER, MORE = "fewer", "more"


class Curve(NamedTuple):
    """Times at strictly increasing points."""

    at: tuple[int, ...]
    ns: tuple[float, ...]


class Surface(NamedTuple):
    """Times by row and column, both strictly increasing; None at the far end of a row: not measured."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ns: tuple[tuple[float | None, ...], ...]


def look_up(curve: Curve, point: int, figure: Callable[[int], float], outside: Callable[[str], None]) -> float:
    """The time at a point; `outside` is told FEWER or MORE where it lies beyond the curve."""
    nearest = min(max(point, curve.at[0]), curve.at[-1])
    time_ns = inside(curve.at, pieces(curve.at, curve.ns), nearest)
    if point == nearest:
        return time_ns
    outside(FEWER if point < nearest else MORE)
    return time_ns * figure(point) / figure(nearest)


def look_up_padded(
    curve: Curve, sizes: Sequence[int], figure: Callable[[int], float], outside: Callable[[str], None]
) -> Callable[[int], float]:
    """The time of a graph that the step is padded to, else on the line through the points beyond them alone.

    The first step that is in no graph may take much longer than the largest that is.
    """
    first = bisect_right(curve.at, sizes[-1]) if sizes else 0
    if first == len(curve.at):
        first = 0
    beyond = Curve(curve.at[first:], curve.ns[first:])

    def time_ns(num: int) -> float:
        if sizes and num <= sizes[-1]:
            return look_up(curve, as_measured(num, sizes, curve.at), figure, outside)
        return look_up(beyond, num, figure, outside)

    return time_ns


def inside(at: Sequence[int], parts: Sequence[tuple[int, float, float]], point: int) -> float:
    """The time at a point, from the first on; `parts` are the `pieces` of these points."""
    start, start_ns, slope = parts[bisect_right(at, point) - 1]
    return start_ns + slope * (point - start)


def pieces(at: Sequence[int], ns: Sequence[float]) -> list[tuple[int, float, float]]:
    """Start, time there and slope of each piece of the line through these points; the last one is level."""
    points = list(zip(at, ns, strict=True))
    slopes = [(ns2 - ns1) / (at2 - at1) for (at1, ns1), (at2, ns2) in pairwise(points)]
    return [(start, time_ns, slope) for (start, time_ns), slope in zip(points, [*slopes, 0.0], strict=True)]


class Slice(NamedTuple):
    """One row of a surface: pieces that begin at its columns, up to `last`; `beyond` for any column but those."""

    columns: Sequence[int]
    last: int
    pieces: Sequence[tuple[int, float, float]]
    beyond: Callable[[int], float]

    def times(self) -> Callable[[int], float]:
        """The row's times by column, as a function that is quick to call."""
        columns, last, parts, beyond = self
        first = columns[0]

        def time_ns(column: int) -> float:
            if first <= column <= last:
                start, start_ns, slope = parts[bisect_right(columns, column) - 1]
                return start_ns + slope * (column - start)
            return beyond(column)

        return time_ns


def two_times(one: Slice, other: Slice) -> Callable[[int], tuple[float, float]]:
    """Times of two rows with the same columns, found at once."""
    columns, first, last = one.columns, one.columns[0], min(one.last, other.last)
    parts = [(*part, *same[1:]) for part, same in zip(one.pieces, other.pieces, strict=True)]
    one_ns, other_ns = one.times(), other.times()

    def times_ns(column: int) -> tuple[float, float]:
        if first <= column <= last:
            start, start1_ns, slope1, start2_ns, slope2 = parts[bisect_right(columns, column) - 1]
            far = column - start
            return start1_ns + slope1 * far, start2_ns + slope2 * far
        return one_ns(column), other_ns(column)

    return times_ns


class Sheet:
    """A surface, ready to be sliced.

    Args:
        surface: the table; every row has a time in its first column.
        figure: by row and column, in proportion to which times go on beyond the table.
        rows_outside: told FEWER or MORE where a row beyond the table is asked for.
        columns_outside: the same for columns, and MORE for those that were not measured.
        is_mean: the table's columns are means over as many things as the row says; `figure` and slices take sums.
    """

    def __init__(
        self,
        surface: Surface,
        figure: Callable[[int, int], float],
        rows_outside: Callable[[str], None],
        columns_outside: Callable[[str], None],
        *,
        is_mean: bool = False,
    ) -> None:
        self._rows, self._figure, self._is_mean = surface.rows, figure, is_mean
        self._means = surface.columns
        self._rows_outside, self._columns_outside = rows_outside, columns_outside
        self._filled = [self._fill(row, line) for row, line in zip(surface.rows, surface.ns, strict=True)]
        self._num_measured = [len(line) - line.count(None) for line in surface.ns]

    def _columns(self, row: int) -> list[int]:
        """What slices call the columns of a row."""
        return [mean * row for mean in self._means] if self._is_mean else list(self._means)

    def _fill(self, row: int, line: tuple[float | None, ...]) -> list[float]:
        """The row with figures, scaled to its last time, where it was not measured."""
        times, columns = [time_ns for time_ns in line if time_ns is not None], self._columns(row)
        per_figure = times[-1] / self._figure(row, columns[len(times) - 1])
        return times + [per_figure * self._figure(row, column) for column in columns[len(times) :]]

    def slice(self, row: int) -> Slice:
        """One row, between rows if need be."""
        index = bisect_right(self._rows, row) - 1
        if row == self._rows[index] or not 0 <= index < len(self._rows) - 1:
            nearest = max(index, 0)
            times, num_measured = self._near(row, nearest), self._num_measured[nearest]
        else:
            times, num_measured = self._between(row, index), min(self._num_measured[index : index + 2])
        columns = self._columns(row)
        parts = pieces(columns, times)

        def beyond(column: int) -> float:
            self._columns_outside(FEWER if column < columns[0] else MORE)
            nearest = min(max(column, columns[0]), columns[-1])
            return inside(columns, parts, nearest) * self._figure(row, column) / self._figure(row, nearest)

        return Slice(columns, columns[num_measured - 1], parts, beyond)

    def _between(self, row: int, index: int) -> list[float]:
        (row1, row2), (times1, times2) = self._rows[index : index + 2], self._filled[index : index + 2]
        share = (row - row1) / (row2 - row1)
        return [one + (other - one) * share for one, other in zip(times1, times2, strict=True)]

    def _near(self, row: int, index: int) -> list[float]:
        nearest, times = self._rows[index], self._filled[index]
        if row == nearest:
            return times
        self._rows_outside(FEWER if row < nearest else MORE)
        return [
            time_ns * self._figure(row, column) / self._figure(nearest, near)
            for time_ns, column, near in zip(times, self._columns(row), self._columns(nearest), strict=True)
        ]
