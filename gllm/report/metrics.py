"""The one definition of every measure, for simulated and measured runs alike.

Per request: TTFT = first token - arrival. TPOT = (finish - first token) / (output tokens - 1), from two output tokens
on. E2E = finish - arrival. Queue = first dispatch - arrival. Their statistics are over finished requests (status stop
or length), percentiles by linear interpolation.

ITL: every gap between two tokens of one sequence, whatever became of its request. Decodes that go on from one batch
to the next share one gap; it enters with their number as weight, less the tokens that were thrown away. Percentiles
by the inverse empirical distribution (a gap that did occur, never one in between).

Active time: at least one request is in the system (arrived and not ended). A stage's bubble is its idle share of the
active time. Duration: first arrival to last end of a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.record import STATUSES
from gllm.report.stats import (
    covered_ns,
    length_ns,
    mean_std,
    overlap_ns,
    ratio,
    running_integral,
    spread,
    union,
    weighted_spread,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gllm.report.record import RunRecord
    from gllm.report.stats import Floats, Intervals

NS_PER_S = 1e9


def summarize(record: RunRecord, *, slo_ttft_s: float | None, slo_tpot_s: float | None) -> dict[str, Any]:
    """All measures of a run as JSON values; a measure that has no value is None.

    A service level objective of None counts as met.
    """
    return {
        "mode": record.mode,
        "decision_sha256": record.decision_sha256,
        **_traffic(record),
        **_throughput(record),
        **_latency(record),
        "goodput": _goodput(record, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s),
        **_pipeline(record),
        **_batches(record),
        **_cache(record),
        "config": plain(record.config),
    }


def has_status(record: RunRecord, *names: str) -> NDArray[np.bool_]:
    """Mask (R,) of the requests that ended in one of the named ways."""
    return np.isin(record.requests["status"], [STATUSES.index(name) for name in names])


def finished(record: RunRecord) -> NDArray[np.bool_]:
    """Mask (R,) of the requests that ran to their end."""
    return has_status(record, "stop", "length")


def request_latencies(record: RunRecord) -> dict[str, Floats]:
    """Columns (R,) of seconds, one row a request; NaN where there is no such latency."""
    rows = record.requests
    decode_s = _between(rows["first_token_ns"], rows["finish_ns"])
    steps = rows["num_output_tokens"] - 1
    return {
        "ttft_s": _between(rows["arrival_ns"], rows["first_token_ns"]),
        "tpot_s": np.where(steps >= 1, decode_s / np.maximum(steps, 1), np.nan),
        "e2e_s": _between(rows["arrival_ns"], rows["finish_ns"]),
        "queue_s": _between(rows["arrival_ns"], rows["scheduled_ns"]),
    }


def finished_latencies(record: RunRecord) -> dict[str, Floats]:
    """The latencies that enter statistics: those of finished requests, where they exist."""
    done = finished(record)
    return {name: column[done & ~np.isnan(column)] for name, column in request_latencies(record).items()}


def inter_token(record: RunRecord) -> tuple[Floats, NDArray[np.int64]]:
    """Inter-token gaps in seconds and how many tokens saw each."""
    previous = np.append(record.batches["previous"], record.gaps["previous"])
    batch = np.append(np.arange(record.batches.size), record.gaps["batch"])
    shared = np.maximum(record.batches["num_continuing"] - record.num_discarded, 0)
    weights = np.append(shared, np.ones(record.gaps.size, dtype=np.int64))
    known = (previous >= 0) & (weights > 0)
    gaps_s = _between(record.done_ns[previous[known]], record.done_ns[batch[known]])
    happened = ~np.isnan(gaps_s)
    return gaps_s[happened], weights[known][happened]


def horizon_ns(record: RunRecord) -> int:
    """The last instant the record knows of."""
    rows = record.requests
    columns = (rows["arrival_ns"], rows["finish_ns"], record.done_ns, record.batches["dispatched_ns"])
    return int(max((column.max(initial=0) for column in (*columns, record.stage_end_ns)), default=0))


def window_ns(record: RunRecord) -> tuple[int, int]:
    """First arrival and last end of a request; equal when nothing ended."""
    rows = record.requests
    first = int(rows["arrival_ns"].min()) if rows.size else 0
    return first, max(first, int(rows["finish_ns"].max(initial=0)))


def active_time(record: RunRecord) -> Intervals:
    """When at least one request was in the system; one that never ended stays until the record's last instant."""
    rows = record.requests
    unended = has_status(record, "unfinished")
    end = np.where(unended, horizon_ns(record), np.maximum(rows["finish_ns"], rows["arrival_ns"]))
    return union(rows["arrival_ns"], end)


def stage_busy(record: RunRecord, stage: int) -> Intervals:
    """When a stage computed."""
    start, end = record.stage_start_ns[:, stage], record.stage_end_ns[:, stage]
    ran = (start >= 0) & (end >= start)
    return union(start[ran], end[ran])


def kv_use(record: RunRecord) -> Floats:
    """Share (B,) of the cache's blocks in use right after each decision."""
    return 1.0 - record.batches["num_free_blocks"] / max(record.num_blocks, 1)


def held_integral(record: RunRecord, values: Floats, at_ns: Floats) -> Floats:
    """Integral over time of a column (B,), up to each instant.

    A value holds from its batch's dispatch to the next one; while no request is in the system it counts as zero.
    """
    active = active_time(record)
    knots = covered_ns(active, np.append(record.batches["dispatched_ns"], horizon_ns(record)))
    return running_integral(values, knots, covered_ns(active, at_ns))


def plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Turn a value into one that strict JSON can hold: no NaN, no infinity, no numpy scalars."""
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _between(start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]) -> Floats:
    """Seconds from one column to another, NaN where either never happened."""
    return np.where((start_ns >= 0) & (end_ns >= 0), (end_ns - start_ns) / NS_PER_S, np.nan)


def _traffic(record: RunRecord) -> dict[str, Any]:
    first, last = window_ns(record)
    return {
        "num_requests": int(record.requests.size),
        "num_finished": int(finished(record).sum()),
        "num_rejected": int(has_status(record, "rejected").sum()),
        "num_aborted": int(has_status(record, "abort").sum()),
        "num_failed": int(has_status(record, "error").sum()),
        "num_unfinished": int(has_status(record, "unfinished").sum()),
        "duration_s": (last - first) / NS_PER_S,
        "wall_s": plain(float(record.wall_s)),
        "num_iterations": int(record.batches.size),
    }


def _throughput(record: RunRecord) -> dict[str, Any]:
    """Finished requests and their tokens over the duration."""
    done = record.requests[finished(record)]
    first, last = window_ns(record)
    duration_s = (last - first) / NS_PER_S
    output = int(done["num_output_tokens"].sum())
    return {
        "requests_per_s": ratio(done.size, duration_s),
        "output_tokens_per_s": ratio(output, duration_s),
        "total_tokens_per_s": ratio(output + int(done["num_prompt_tokens"].sum()), duration_s),
    }


def _latency(record: RunRecord) -> dict[str, Any]:
    spreads = {name: spread(values) for name, values in finished_latencies(record).items()}
    return {**spreads, "itl_s": weighted_spread(*inter_token(record))}


def _goodput(record: RunRecord, *, slo_ttft_s: float | None, slo_tpot_s: float | None) -> dict[str, float | None]:
    """Finished requests within both objectives, per second and as a share of all requests.

    A request with a single output token has no TPOT and meets that objective. Without any objective
    every finished request is good, and there is nothing to attain.
    """
    columns = request_latencies(record)
    missed = (columns["ttft_s"] > _limit(slo_ttft_s)) | (columns["tpot_s"] > _limit(slo_tpot_s))
    num_good = int((finished(record) & ~missed).sum())
    first, last = window_ns(record)
    return {
        "slo_ttft_s": slo_ttft_s,
        "slo_tpot_s": slo_tpot_s,
        "requests_per_s": ratio(num_good, (last - first) / NS_PER_S),
        "attainment": None if slo_ttft_s is slo_tpot_s is None else ratio(num_good, record.requests.size),
    }


def _limit(slo_s: float | None) -> float:
    return np.inf if slo_s is None else slo_s


def _pipeline(record: RunRecord) -> dict[str, Any]:
    """Per stage, and the mean bubble over the stages."""
    active = active_time(record)
    first, last = window_ns(record)
    stages = [_stage(stage_busy(record, s), active, last - first) for s in range(record.stage_start_ns.shape[1])]
    bubbles = [stage["bubble_fraction"] for stage in stages if stage["bubble_fraction"] is not None]
    return {"bubble_fraction": ratio(sum(bubbles), len(bubbles)), "stages": stages}


def _stage(busy: Intervals, active: Intervals, duration_ns: int) -> dict[str, float | None]:
    active_ns, busy_ns = length_ns(active), length_ns(busy)
    return {
        "busy_s": busy_ns / NS_PER_S,
        "bubble_fraction": ratio(active_ns - overlap_ns(busy, active), active_ns),
        "occupancy": ratio(busy_ns, duration_ns),
    }


def _batches(record: RunRecord) -> dict[str, Any]:
    prefill, decode = record.batches["num_prefill_tokens"], record.batches["num_decode_tokens"]
    return {
        "tokens_per_batch": mean_std(prefill + decode),
        "prefill_tokens_per_batch": mean_std(prefill),
        "decode_tokens_per_batch": mean_std(decode),
        "num_discarded_tokens": int(record.num_discarded.sum()),
    }


def _cache(record: RunRecord) -> dict[str, Any]:
    """Prefix hits of admitted requests; KV use, its mean over active time after the first dispatch."""
    admitted = record.requests[record.requests["scheduled_ns"] >= 0]
    use, free = kv_use(record), record.batches["num_free_blocks"]
    return {
        "num_preemptions": int(record.requests["num_preemptions"].sum()),
        "num_cached_tokens": int(admitted["num_cached_tokens"].sum()),
        "num_peak_blocks": record.num_blocks - int(free.min()) if free.size else None,
        "prefix_hit_rate": ratio(admitted["num_cached_tokens"].sum(), admitted["num_prompt_tokens"].sum()),
        "kv_use": {"mean": _kv_mean(record, use), "peak": float(use.max()) if use.size else None},
    }


def _kv_mean(record: RunRecord, use: Floats) -> float | None:
    if not use.size:
        return None
    ends = np.array([record.batches["dispatched_ns"][0], horizon_ns(record)], dtype=np.float64)
    begun, ended = covered_ns(active_time(record), ends)
    return ratio(held_integral(record, use, ends)[-1], ended - begun)
