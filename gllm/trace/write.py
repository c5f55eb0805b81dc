"""Writing gLLM's own format (traces/SCHEMA.md); reading it back gives equal requests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.trace.errors import TraceError
from gllm.trace.formats.own import VERSION

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from gllm.trace.request import Trace, TraceRequest


def write_trace(trace: Trace, path: str | os.PathLike[str], *, description: str = "") -> None:
    """Writes `trace` to `path`, zipped if the name ends in `.gz`; equal traces make equal files.

    Raises:
        TraceError: where `extra` holds what JSON cannot.
        OSError: where the file cannot be written.
    """
    lines = trace_lines(trace.requests, name=trace.name, description=description)
    data = "".join(f"{line}\n" for line in lines).encode()
    zipped = str(path).endswith(".gz")
    Path(path).write_bytes(gzip.compress(data, mtime=0) if zipped else data)


def trace_lines(requests: Sequence[TraceRequest], *, name: str, description: str = "") -> Iterator[str]:
    """The file's lines without their ends: a header, then a line for each request."""
    size = next((request.hash_block_size for request in requests if request.hash_block_size), 0)
    header = {"gllm_trace": VERSION, "name": name, "description": description, "hash_block_size": size}
    yield _json({key: value for key, value in header.items() if value})
    for number, request in enumerate(requests, start=1):
        try:
            yield _json(_row(request, size))
        except (TypeError, ValueError) as error:
            raise TraceError(f"request {number} cannot be written as JSON: {error}") from None


def _row(request: TraceRequest, header_size: int) -> dict[str, Any]:
    """Only what differs from the defaults."""
    lengths = {"num_prompt_tokens": request.num_prompt_tokens, "num_output_tokens": request.num_output_tokens}
    optional: dict[str, tuple[Any, Any]] = {  # value, default
        "hash_ids": (_runs(request.hash_ids), []),
        "hash_block_size": (request.hash_block_size, header_size),
        "priority": (request.priority, 0),
        "deadline_ns": (request.deadline_ns, None),
        "max_tokens": (request.max_tokens, None),
        "extra": (dict(request.extra), {}),
    }
    arrival = {} if request.arrival_ns is None else {"arrival_ns": request.arrival_ns}
    return arrival | lengths | {key: value for key, (value, default) in optional.items() if value != default}


def _runs(ids: Iterable[int]) -> list[int | list[int]]:
    """Ids with each run of neighbours as `[first, last]`: fresh blocks are numbered in a row."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [first if first == last else [first, last] for first, last in runs]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
