"""The fields of a profile's JSON, each read with an error that names the file and the field."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gllm.sim.interpolation import Curve, Surface

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_NS = 10**15
"""No step takes longer: eleven days."""

AGAIN = "write it anew with python -m gllm.runtime profile"


class Fields:
    """One JSON object of a profile."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self._values, self._path, self._prefix = values, path, prefix

    def wrong(self, key: str, what: str) -> ValueError:
        """What to raise."""
        return ValueError(f"{self._path}: field {(self._prefix + key).strip('.')} {what}; {AGAIN}")

    def is_absent(self, key: str) -> bool:
        """Whether it is missing or null."""
        return self._values.get(key) is None

    def get(self, key: str) -> Any:  # noqa: ANN401 - any JSON value
        """Whatever it holds."""
        if key not in self._values:
            raise self.wrong(key, "is missing")
        return self._values[key]

    def part(self, key: str) -> Fields:
        """An object inside."""
        return self._part(key, self.get(key))

    def parts(self, key: str) -> list[Fields]:
        """A list of objects."""
        values = self.get(key)
        if not isinstance(values, list):
            raise self.wrong(key, "is no list")
        return [self._part(f"{key}[{index}]", value) for index, value in enumerate(values)]

    def _part(self, key: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise self.wrong(key, "is no object")
        return Fields(value, self._path, f"{self._prefix}{key}.")

    def text(self, key: str) -> str:
        """A name."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {value!r}, not a text")
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """A known name."""
        value = self.text(key)
        if value not in known:
            raise self.wrong(key, f"is {value!r}; known are {', '.join(sorted(known))}")
        return value

    def whole(self, key: str, low: int = 0) -> int:
        """A whole number from `low`."""
        return self.integers(key, [self.get(key)], low)[0]

    def share(self, key: str, *, up_to_one: bool = False) -> float:
        """A number from 0 to less than 1, or to 1."""
        value = self.get(key)
        if type(value) not in {int, float} or not 0 <= value <= 1 or (value == 1 and not up_to_one):
            raise self.wrong(key, f"is {value!r}, not a number from 0 to {'' if up_to_one else 'less than '}1")
        return float(value)

    def numbers(self, key: str, values: object) -> tuple[float, ...]:
        """A list of numbers from 0, none of which is beyond measure."""
        if not isinstance(values, list):
            raise self.wrong(key, "is no list")
        for value in values:
            if type(value) not in {int, float} or not 0 <= value <= MAX_NS:
                raise self.wrong(key, f"holds {value!r}, not a number from 0")
        return tuple(map(float, values))

    def integers(self, key: str, values: object, low: int = 0) -> tuple[int, ...]:
        """A list of whole numbers from `low`."""
        if not isinstance(values, list):
            raise self.wrong(key, "is no list")
        for value in values:
            if type(value) is not int or not low <= value <= MAX_NS:
                limit = f"of at least {low}" if low > -MAX_NS else "of nanoseconds"
                raise self.wrong(key, f"holds {value!r}, not a whole number {limit}")
        return tuple(values)

    def points(self, key: str, low: int, *, may_be_empty: bool = False) -> tuple[int, ...]:
        """Strictly increasing whole numbers from `low`."""
        values = self.integers(key, self.get(key), low)
        if not values and not may_be_empty:
            raise self.wrong(key, "is empty")
        if any(one >= other for one, other in pairwise(values)):
            raise self.wrong(key, "must increase from one to the next")
        return values

    def curve(self, points: str) -> Curve:
        """The fields `points` and "ns"."""
        at, ns = self.points(points, 1), self.integers("ns", self.get("ns"))
        if len(ns) != len(at):
            raise self.wrong("ns", f"has {len(ns)} times for {len(at)} {points}")
        return Curve(at, ns)

    def surface(self, rows: str, columns: str, ns: str) -> Surface:
        """Rows that hold nothing are left out."""
        at, across, lines = self.points(rows, 1), self.points(columns, 0), self.get(ns)
        if not isinstance(lines, list) or len(lines) != len(at):
            raise self.wrong(ns, f"must be one list for each of its {len(at)} {rows}")
        table = {row: self._row(ns, line, columns, len(across)) for row, line in zip(at, lines, strict=True)}
        table = {row: line for row, line in table.items() if line[0] is not None}
        if not table:
            raise self.wrong(ns, "holds no time")
        return Surface(tuple(table), across, tuple(table.values()))

    def _row(self, key: str, line: object, columns: str, num_columns: int) -> tuple[float | None, ...]:
        if not isinstance(line, list) or len(line) != num_columns:
            raise self.wrong(key, f"must have one time for each of its {num_columns} {columns} in each row")
        measured = [value for value in line if value is not None]
        if line[: len(measured)] != measured:
            raise self.wrong(key, "has a null before a time; they may only end a row")
        return (*self.integers(key, measured, -MAX_NS), *[None] * (num_columns - len(measured)))
