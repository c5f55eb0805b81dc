"""What a run leaves behind: plain columns, equal for simulated and measured runs.

Times are integer nanoseconds since the run's start; -1 means "never happened".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

STATUSES = ("unfinished", "stop", "length", "abort", "error", "rejected")
"""How a request ended; `REQUEST_DTYPE["status"]` indexes this tuple."""

REQUEST_DTYPE = np.dtype(
    [
        ("arrival_ns", np.int64),
        ("scheduled_ns", np.int64),  # first chunk dispatched
        ("first_token_ns", np.int64),
        ("finish_ns", np.int64),
        ("num_prompt_tokens", np.int64),
        ("num_output_tokens", np.int64),
        ("num_cached_tokens", np.int64),  # prefix-cache hits at the first admission
        ("num_preemptions", np.int64),
        ("status", np.int64),
    ]
)
"""One row a request, in order of submission; the row number is the request's id."""

BATCH_DTYPE = np.dtype(
    [
        ("dispatched_ns", np.int64),
        ("num_prefill_tokens", np.int64),
        ("num_decode_tokens", np.int64),
        ("num_free_blocks", np.int64),  # right after the decision, evictable blocks included
        ("num_waiting", np.int64),
        ("num_running", np.int64),
        ("previous", np.int64),  # batch in which the continuing decodes took their last step
        ("num_continuing", np.int64),  # decodes whose gap since `previous` is one and the same; discarded ones included
    ]
)
"""One row a micro-batch, in order of dispatch; the row number is the plan's id."""

GAP_DTYPE = np.dtype([("previous", np.int64), ("batch", np.int64)])
"""One inter-token gap of a single sequence: between the ends of two batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The columns of one run.

    Shapes: R requests, B micro-batches, S pipeline stages, G single gaps.
    A stage's start and end are when it computed that batch.
    """

    config: Mapping[str, Any]  # the whole configuration that produced the run, as JSON values
    mode: str  # "simulated" or "measured"
    wall_s: float  # how long the run took to produce
    decision_sha256: str | None  # of the decision log; None when the log was off
    num_blocks: int
    block_size: int
    requests: NDArray[np.void]  # (R,) REQUEST_DTYPE
    batches: NDArray[np.void]  # (B,) BATCH_DTYPE
    done_ns: NDArray[np.int64]  # (B,) when the batch's tokens were back at the engine
    num_discarded: NDArray[np.int64]  # (B,) tokens computed for sequences that had already stopped
    gaps: NDArray[np.void]  # (G,) GAP_DTYPE
    stage_start_ns: NDArray[np.int64]  # (B, S)
    stage_end_ns: NDArray[np.int64]  # (B, S)
