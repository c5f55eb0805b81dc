"""Records made by hand, and big ones made by the dice."""

import numpy as np

from gllm.report.record import BATCH_DTYPE, GAP_DTYPE, REQUEST_DTYPE, STATUSES, RunRecord

STOP, LENGTH, ABORT, REJECTED, UNFINISHED = map(STATUSES.index, ("stop", "length", "abort", "rejected", "unfinished"))
SECOND = 1_000_000_000


def record(*, requests=(), batches=(), gaps=(), stages=(), done=(), discarded=None, num_stages=2, **changes):
    """A record from rows whose times are seconds; -1 stays -1."""
    shape = (len(batches), num_stages)
    span = _ns(np.array(stages, dtype=float).reshape(*shape, 2))
    fields = {
        "config": {"model": "toy", "policy": {"name": "fixed"}},
        "mode": "simulated",
        "wall_s": 0.5,
        "decision_sha256": "ab" * 32,
        "num_blocks": 10,
        "block_size": 16,
        "requests": _table(requests, REQUEST_DTYPE, 4),
        "batches": _table(batches, BATCH_DTYPE, 1),
        "done_ns": _ns(np.array(done, dtype=float)),
        "num_discarded": np.array(discarded if discarded is not None else [0] * len(batches), dtype=np.int64),
        "gaps": _table(gaps, GAP_DTYPE, 0),
        "stage_start_ns": span[..., 0],
        "stage_end_ns": span[..., 1],
    }
    return RunRecord(**{**fields, **changes})


def by_hand(**changes):
    """Two stages, five micro-batches, four requests: one stops, one has a single token, one is rejected, one aborts."""
    rows = {
        "requests": [
            (0, 0, 2, 6, 10, 3, 4, 1, STOP),
            (1, 2, 4, 4, 6, 1, 0, 0, LENGTH),
            (1, -1, -1, 1, 99, 0, 0, 0, REJECTED),
            (8, 8, -1, 10, 4, 0, 0, 0, ABORT),
        ],
        "batches": [
            (0, 6, 0, 8, 0, 1, -1, 0),
            (2, 6, 1, 6, 0, 2, 0, 1),
            (4, 0, 1, 8, 0, 1, 1, 1),
            (5, 0, 1, 8, 0, 1, 2, 1),  # thrown away: the sequence stopped in the batch before
            (8, 4, 0, 9, 0, 1, -1, 0),
        ],
        "stages": [[(0, 1), (1, 2)], [(2, 3), (3, 4)], [(4, 5), (5, 6)], [(5, 6.5), (6.5, 7)], [(8, 9), (9, 10.5)]],
        "done": [2, 4, 6, 7, 10.5],
        "discarded": [0, 0, 0, 1, 0],
        "gaps": [(0, 2)],
    }
    return record(**{**rows, **changes})


def at_random(num_batches, num_requests, num_stages=4, seed=0):
    """A long and busy run; plausible rather than possible."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(8_000_000, 30_000_000, num_batches)
    start = np.cumsum(cost)[:, None] + np.arange(num_stages) * 40_000_000
    span = int(start[-1, -1])
    requests = np.zeros(num_requests, REQUEST_DTYPE)
    steps = rng.integers(1_000_000, 2_000_000_000, (3, num_requests)).cumsum(axis=0)
    requests["arrival_ns"] = np.sort(rng.integers(0, span, num_requests))
    for name, step in zip(("scheduled_ns", "first_token_ns", "finish_ns"), steps, strict=True):
        requests[name] = requests["arrival_ns"] + step
    requests["num_prompt_tokens"] = rng.integers(10, 4000, num_requests)
    requests["num_output_tokens"] = rng.integers(1, 400, num_requests)
    requests["status"] = STOP
    batches = np.zeros(num_batches, BATCH_DTYPE)
    batches["dispatched_ns"] = start[:, 0]
    for name, high in zip(BATCH_DTYPE.names[1:6], (2048, 200, 10_000, 50, 800), strict=True):
        batches[name] = rng.integers(0, high, num_batches)
    batches["previous"] = np.arange(num_batches) - num_stages
    batches["num_continuing"] = batches["num_decode_tokens"]
    return record(
        requests=requests,
        batches=batches,
        stages=np.stack([start, start + cost[:, None]], axis=2) / SECOND,
        done=(start[:, -1] + cost) / SECOND,
        gaps=np.zeros(0, GAP_DTYPE),
        num_stages=num_stages,
        num_blocks=10_000,
    )


def _table(rows, dtype, num_times):
    """A structured array; its first columns are times."""
    if isinstance(rows, np.ndarray):
        return rows
    return np.array([(*_ns(np.array(row[:num_times], dtype=float)), *row[num_times:]) for row in rows], dtype)


def _ns(seconds):
    return np.where(seconds < 0, -1, np.round(seconds * SECOND)).astype(np.int64)
