"""`timeline.json`: the run as trace events for ui.perfetto.dev.

One process is the pipeline with a lane a stage and counters for the cache and the queue; another holds the requests,
each in a free lane, as its phases queued, prefill and decode. Time stamps are microseconds with nanosecond decimals.
Long runs keep their beginning: an unbroken stretch tells more than a sample. What is left out is counted in the file.

Of two runs of one trace (`write_twin_timeline`) the first process has both runs' lanes of stage 0 above each other,
then those of stage 1, and so on; each run's counters are a process of their own. Both clocks begin with the trace.
"""

from __future__ import annotations

import json
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.metrics import has_status, horizon_ns, kv_use
from gllm.report.record import STATUSES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import TextIO

    from numpy.typing import NDArray

    from gllm.report.record import RunRecord

PIPELINE, REQUESTS = 1, 2
PHASES = ("queued", "prefill", "decode")


def write_timeline(
    file: TextIO, record: RunRecord, *, max_slices: int = 200_000, max_requests: int = 2_000
) -> dict[str, int]:
    """Stream the events of at most `max_slices` slices; return what was kept and what was left out.

    Requests get at most a quarter of the slices, the pipeline's stages the rest.
    """
    num_requests = min(record.requests.size, max_requests, max_slices // (4 * len(PHASES)))
    num_stages = record.stage_start_ns.shape[1]
    room = max_slices - num_requests * len(PHASES)
    num_batches = min(record.batches.size, room // max(num_stages, 1))
    counts = {
        "num_batches": num_batches,
        "num_batches_left_out": record.batches.size - num_batches,
        "num_requests": num_requests,
        "num_requests_left_out": record.requests.size - num_requests,
    }
    _write(file, counts, _events(record, num_batches, num_requests, num_stages))
    return counts


def write_twin_timeline(file: TextIO, runs: Mapping[str, RunRecord], *, max_slices: int = 200_000) -> dict[str, int]:
    """Stream the stages of several runs, by name, as lanes above each other; return what was kept and left out."""
    num_slices = sum(record.stage_start_ns.shape[1] for record in runs.values())
    most = max_slices // max(num_slices, 1)
    counts = {}
    for name, record in runs.items():
        counts[f"num_batches_{name}"] = min(record.batches.size, most)
        counts[f"num_batches_{name}_left_out"] = max(record.batches.size - most, 0)
    _write(file, counts, _twin_events(runs, most))
    return counts


def _write(file: TextIO, counts: Mapping[str, int], events: Iterable[str]) -> None:
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(counts)},"traceEvents":[\n')
    separator = ""
    for event in events:
        file.write(separator + event)
        separator = ",\n"
    file.write("\n]}\n")


def _twin_events(runs: Mapping[str, RunRecord], num_batches: int) -> Iterator[str]:
    """All events of several runs, each as JSON text."""
    yield from _name_process(PIPELINE, "pipelines", f"first {num_batches} batches of each run")
    num_stages = max(record.stage_start_ns.shape[1] for record in runs.values())
    for stage in range(num_stages):
        for place, (name, record) in enumerate(runs.items()):
            lane = stage * len(runs) + place
            yield from _name_lane(PIPELINE, lane, f"stage {stage}, {name}")
            yield from _stage(record, stage, num_batches, lane)
    for process, (name, record) in enumerate(runs.items(), start=PIPELINE + 1):
        yield from _name_process(process, f"{name}: cache and queue", "as each decision left them")
        yield from _counters(record, num_batches, process)


def _events(record: RunRecord, num_batches: int, num_requests: int, num_stages: int) -> Iterator[str]:
    """All events, each as JSON text."""
    kept = f"first {num_batches} of {record.batches.size} batches"
    yield from _name_process(PIPELINE, "pipeline", kept)
    for stage in range(num_stages):
        yield from _name_lane(PIPELINE, stage, f"stage {stage}")
        yield from _stage(record, stage, num_batches, stage)
    yield from _counters(record, num_batches, PIPELINE)
    yield from _name_process(REQUESTS, "requests", f"first {num_requests} of {record.requests.size} requests")
    yield from _requests(record, num_requests)


def _stage(record: RunRecord, stage: int, num_batches: int, lane: int) -> Iterator[str]:
    """What one stage computed, a slice a micro-batch."""
    rows = record.batches[:num_batches]
    columns = (
        record.stage_start_ns[:num_batches, stage],
        record.stage_end_ns[:num_batches, stage],
        rows["num_prefill_tokens"],
        rows["num_decode_tokens"],
    )
    # lists of Python ints: formatting numpy scalars one by one takes several times as long
    for batch, (start, end, prefill, decode) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if 0 <= start <= end:
            args = f'{{"prefill_tokens":{prefill},"decode_tokens":{decode}}}'
            yield _slice(PIPELINE, lane, f"batch {batch}: {prefill}p+{decode}d", (start, end), args)


def _counters(record: RunRecord, num_batches: int, process: int) -> Iterator[str]:
    """Cache and queue as each decision left them; a value that stays is not repeated."""
    rows = record.batches[:num_batches]
    tracks = {
        "KV cache in use, %": (100 * kv_use(record)[:num_batches]).round(2),
        "waiting": rows["num_waiting"],
        "running": rows["num_running"],
    }
    for name, column in tracks.items():
        new = np.append(True, column[1:] != column[:-1])[: column.size]
        for time, value in zip(rows["dispatched_ns"][new].tolist(), column[new].tolist(), strict=True):
            yield f'{{"name":"{name}","ph":"C","pid":{process},"ts":{_us(time)},"args":{{"value":{value}}}}}'


def _requests(record: RunRecord, num_requests: int) -> Iterator[str]:
    """Each request's phases, in the lowest lane that is free when it arrives."""
    rows = record.requests[:num_requests]
    bounds = _bounds(record)[:num_requests]
    lanes = _lanes(bounds[:, 0], bounds[:, -1])
    for lane in range(int(lanes.max(initial=-1)) + 1):
        yield from _name_lane(REQUESTS, lane, f"lane {lane}")
    counts = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_preemptions")
    for request in np.argsort(bounds[:, 0], kind="stable").tolist():
        row, times = rows[request], bounds[request].tolist()
        args = {"request": request, "status": STATUSES[row["status"]], **{name: int(row[name]) for name in counts}}
        for phase, start, end in zip(PHASES, times, times[1:], strict=False):
            if end > start:
                yield _slice(REQUESTS, int(lanes[request]), f"{phase} r{request}", (start, end), json.dumps(args))


def _bounds(record: RunRecord) -> NDArray[np.int64]:
    """Nanoseconds (R, 4) at which a request arrived, was scheduled, gave its first token and ended.

    A step that never happened coincides with the end, so that the phase before it lasts until then.
    """
    rows = record.requests
    end = np.where(
        has_status(record, "unfinished"), horizon_ns(record), np.maximum(rows["finish_ns"], rows["arrival_ns"])
    )
    steps = [np.where(rows[name] >= 0, rows[name], end) for name in ("scheduled_ns", "first_token_ns")]
    return np.stack([rows["arrival_ns"], *steps, end], axis=1)


def _lanes(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fewest lanes in which intervals do not overlap, low lanes first."""
    lanes = np.zeros(starts.size, dtype=np.int64)
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    for index in np.argsort(starts, kind="stable").tolist():
        while busy and busy[0][0] <= starts[index]:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy)
        heappush(busy, (int(ends[index]), lane))
        lanes[index] = lane
    return lanes


def _slice(process: int, lane: int, name: str, span_ns: tuple[int, int], args: str) -> str:
    start_ns, end_ns = span_ns
    return (
        f'{{"name":"{name}","ph":"X","pid":{process},"tid":{lane},'
        f'"ts":{_us(start_ns)},"dur":{_us(end_ns - start_ns)},"args":{args}}}'
    )


def _us(time_ns: int) -> str:
    """Microseconds with three exact decimals."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


def _name_process(process: int, name: str, label: str) -> Iterator[str]:
    yield _metadata("process_name", process, 0, name=name)
    yield _metadata("process_labels", process, 0, labels=label)
    yield _metadata("process_sort_index", process, 0, sort_index=process)


def _name_lane(process: int, lane: int, name: str) -> Iterator[str]:
    yield _metadata("thread_name", process, lane, name=name)
    yield _metadata("thread_sort_index", process, lane, sort_index=lane)


def _metadata(kind: str, process: int, lane: int, **args: Any) -> str:  # noqa: ANN401 - strings and numbers
    return json.dumps({"name": kind, "ph": "M", "pid": process, "tid": lane, "args": args})
