"""Traces that are tables with a header: a format is the names of its columns."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.trace.errors import TraceError
from gllm.trace.fields import tokens
from gllm.trace.request import NO_EXTRA, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFormat:
    """Reads comma-separated rows; `needs` are the columns that tell the format from others."""

    needs: tuple[str, ...]
    arrival: str | None  # None: lengths only
    prompt: str
    output: str
    parse_time: Callable[[str, str], int]  # (cell, column) -> ns

    def missing(self, first: str) -> list[str]:
        """Columns that the header line lacks."""
        try:
            columns = _columns(next(_records([first])))
        except TraceError:
            columns = []
        return [column for column in self.needs if column not in columns]

    def read(self, lines: Iterator[str]) -> Iterator[TraceRequest]:
        """Rows below the header; cells of other columns are kept as text in `extra`."""
        records = _records(lines)
        columns = _columns(next(records))
        for record in records:
            if len(record) != len(columns):
                raise TraceError(f"has {len(record)} cells, the header {len(columns)}; repair or delete the row")
            yield self._request(dict(zip(columns, record, strict=True)))

    def _request(self, cells: dict[str, str]) -> TraceRequest:
        return TraceRequest(
            arrival_ns=None if self.arrival is None else self.parse_time(cells.pop(self.arrival), self.arrival),
            num_prompt_tokens=tokens(cells.pop(self.prompt), self.prompt),
            num_output_tokens=tokens(cells.pop(self.output), self.output),
            extra=cells or NO_EXTRA,
        )


def _records(lines: Iterable[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines)
    except csv.Error as error:
        raise TraceError(f"is not comma-separated text: {error}") from None


def _columns(record: list[str]) -> list[str]:
    columns = [cell.strip() for cell in record]
    if len(set(columns)) < len(columns):
        raise TraceError("the header names a column twice; rename one")
    return columns
