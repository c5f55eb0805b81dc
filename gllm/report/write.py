"""Put a run's report into a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gllm.report.files import REPORT_NAME, replacing
from gllm.report.metrics import NS_PER_S, request_latencies, summarize
from gllm.report.page import run_page
from gllm.report.record import STATUSES
from gllm.report.record_file import write_record
from gllm.report.timeline import write_timeline

if TYPE_CHECKING:
    from pathlib import Path

    from pandas import DataFrame

    from gllm.report.record import RunRecord


def write_run(
    directory: Path,
    record: RunRecord,
    *,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    intervals: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write report.json, record.npz, requests.csv, report.html and timeline.json; return the summary in report.json.

    `intervals` say where its measures are expected (`gllm.report.rows.bounds`) and become part of it.
    Each file is whole or absent, and replaces only one of its own name. The folder is made where it is missing.
    """
    summary = summarize(record, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s)
    summary |= {} if intervals is None else {"intervals": intervals}
    write_json(directory / REPORT_NAME, summary)
    write_record(directory, record)
    with replacing(directory / "requests.csv") as file:
        request_table(record).to_csv(file, index=False, lineterminator="\n")
    with replacing(directory / "report.html") as file:
        file.write(run_page(record, summary))
    with replacing(directory / "timeline.json") as file:
        write_timeline(file, record)
    return summary


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write strict JSON; NaN and infinity raise ValueError."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def request_table(record: RunRecord) -> DataFrame:
    """One row a request; times in seconds since the run's start, empty where nothing happened."""
    import pandas as pd  # noqa: PLC0415 - the command line starts without it

    rows = record.requests
    latencies = request_latencies(record)
    counts = ("num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions")
    return pd.DataFrame(
        {
            "id": np.arange(rows.size),
            "arrival_s": rows["arrival_ns"] / NS_PER_S,
            **{name: latencies[name].round(9) for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s")},
            **{name: rows[name] for name in counts},
            "status": np.array(STATUSES)[rows["status"]],
        }
    )
