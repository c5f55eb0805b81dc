"""`load_trace`: from a file, standard input or a sample to a `Trace` that is ready to replay."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from gllm.trace.arrivals import parse_arrivals
from gllm.trace.errors import TraceError
from gllm.trace.fields import MAX_NS
from gllm.trace.formats import FORMATS, pick_format
from gllm.trace.lines import Lines, open_lines, trace_name
from gllm.trace.request import Trace
from gllm.trace.shape import clipped, drawn, faster, in_window, parse_window, repeated

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from gllm.trace.request import TraceRequest
    from gllm.trace.shape import Requests


def load_trace(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - what users call it
    rate_scale: float = 1.0,
    window: str | None = None,
    limit: int | None = None,
    repeat: int = 1,
    arrivals: str | None = None,
    seed: int = 0,
    max_total_tokens: int | None = None,
) -> Trace:
    """Reads a trace and bends it as told: first cut, then repeated, drawn anew, sped up and clipped.

    Args:
        source: a path (zipped or not), `-` for standard input, or a shipped sample's name.
        format: one of `FORMATS`; None: told from the first line.
        limit: read the first so many rows that can be served, and no further.
        window: `START:END` in seconds, of the file's own times, or of drawn ones if it has none.
        repeat: go through the rows so many times, to `limit` requests at most; 0: until `limit`.
        arrivals: `poisson:RATE`, `gamma:RATE:CV` or `burst`: times drawn in place of the file's.
        seed: of the drawn times.
        rate_scale: arrivals so many times as fast.
        max_total_tokens: clip each request: its output, down to one token, then its prompt.

    Raises:
        TraceError: a `ValueError` of one line: the file, the row, what is wrong, what to do.
    """
    _check_options(rate_scale, limit, repeat, max_total_tokens)
    span = parse_window(":" if window is None else window)
    process = None if arrivals is None else parse_arrivals(arrivals)
    name, requests, notes = _read(source, format, limit)
    with _blaming(str(source)):
        cut = partial(in_window, window=span, notes=notes)
        again = partial(repeated, times=repeat, limit=limit)
        draw = partial(drawn, process=process, seed=seed)
        timed = _has_times(requests, drawn=process is not None)
        for step in (cut, again, draw) if timed else (again, draw, cut):
            requests = step(requests)
        requests = clipped(faster(requests, rate_scale), max_total_tokens, notes)
        _check_span(requests)
    notes += [f"arrivals drawn: {arrivals}, seed {seed}"] if process else []
    return Trace(name=trace_name(source), format=name, requests=tuple(requests), notes=tuple(notes))


def _read(source: str | os.PathLike[str], name: str | None, limit: int | None) -> tuple[str, Requests, list[str]]:
    """The format, the rows that can be served, in the file's order, and a note about the others."""
    with open_lines(source) as lines, _blaming(lines):
        first = next(lines, None)
        if first is None:
            raise TraceError("is empty; a trace has a row for each request")
        name = pick_format(first, name)
        requests, num_skipped = _served(FORMATS[name].read(chain([first], lines)), limit)
    if not requests:
        found = "only rows without a prompt or an output" if num_skipped else "a header, but no rows"
        raise TraceError(f"{lines.name}: has {found}; nothing can be replayed")
    notes = [f"rows skipped, since they have no prompt or no output: {num_skipped:,}"] if num_skipped else []
    return name, requests, notes


def _served(rows: Iterable[TraceRequest], limit: int | None) -> tuple[list[TraceRequest], int]:
    """The first `limit` rows that have both lengths, and how many had not; nothing beyond is read."""
    requests: list[TraceRequest] = []
    num_skipped = 0
    for row in rows:
        if not (row.num_prompt_tokens and row.num_output_tokens):
            num_skipped += 1
            continue
        requests.append(row)
        if len(requests) == limit:
            break
    return requests, num_skipped


def _has_times(requests: Requests, *, drawn: bool) -> bool:
    """Whether every request has its own arrival; if not, they must be drawn."""
    num_without = sum(request.arrival_ns is None for request in requests)
    if num_without and not drawn:
        raise TraceError(
            f"{num_without:,} of {len(requests):,} rows have no arrival time; draw them: --arrivals poisson:10 "
            "(10 requests/s), gamma:10:2.5 or burst"
        )
    return not num_without


def _check_options(rate_scale: float, limit: int | None, repeat: int, max_total_tokens: int | None) -> None:
    if not 1e-6 <= rate_scale <= 1e6:
        raise TraceError(f"rate_scale is {rate_scale}; it must be between 0.000001 and 1000000 (2: twice as fast)")
    if limit is not None and limit < 1:
        raise TraceError(f"limit is {limit}; at least one row must be read")
    if repeat < 0 or (repeat == 0 and limit is None):
        raise TraceError(f"repeat is {repeat}; it must be at least 1, or 0 with a limit to fill")
    if max_total_tokens is not None and max_total_tokens < 2:
        raise TraceError(f"max_total_tokens is {max_total_tokens}; a request has a prompt and an output token at least")


def _check_span(requests: Requests) -> None:
    last_ns = max(moment for request in requests for moment in (request.arrival_ns or 0, request.deadline_ns or 0))
    if last_ns > MAX_NS:
        raise TraceError("would last 292 years or more; raise the rate or shorten the trace")


@contextmanager
def _blaming(culprit: Lines | str) -> Iterator[None]:
    """Puts the file's name, and the row where one is being read, before an error's message."""
    try:
        yield
    except TraceError as error:
        row = f", row {culprit.number}" if isinstance(culprit, Lines) and culprit.number else ""
        name = culprit.name if isinstance(culprit, Lines) else culprit
        raise TraceError(f"{name}{row}: {error}") from None
