"""Runs that the simulator wrote as if workers had: the folder of a measured run, under a cost model that is known."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from gllm.console.output import TRACE_NAME
from gllm.parallel import Parallel
from gllm.report.decision_log import LOG_NAME
from gllm.report.metrics import summarize
from gllm.report.record_file import write_record
from gllm.report.write import write_json
from gllm.sim.config import SimConfig
from gllm.sim.run import simulate
from gllm.trace import Trace, TraceRequest, write_trace

BASE = SimConfig(model="qwen3-0.6b", profile="none", parallel=Parallel(pp=2), num_blocks=600, max_model_len=4096)


def small_trace(seed=0, num_requests=40, *, gap_ns=8_000_000, block_size=16):
    """Prompts of which some share a beginning, arriving at random; all at once where `gap_ns` is 0."""
    dice, now, rows = Random(seed), 0, []
    for number in range(num_requests):
        own = 1000 * (number + 1)
        ids = (*range(dice.randrange(3) * 100, dice.randrange(1, 9) + 300), *range(own, own + dice.randrange(1, 40)))
        rows.append(
            TraceRequest(
                arrival_ns=now,
                num_prompt_tokens=len(ids[-60:]) * block_size,
                num_output_tokens=dice.randrange(1, 50),
                hash_ids=ids[-60:],
                hash_block_size=block_size,
            )
        )
        now += dice.randrange(2 * gap_ns + 1)
    return Trace(name="small", format="gllm", requests=rows)


def record_run(folder, trace, config=BASE, **changes):
    """Simulate, and write what `fidelity` reads of a measured run; returns the record."""
    folder.mkdir(parents=True)
    config = replace(config, **changes)
    record = replace(simulate(config, trace, log_path=folder / LOG_NAME), mode="measured")
    hashed = [replace(row, hash_ids=row.block_hashes(config.block_size)) for row in trace.requests]
    write_trace(replace(trace, requests=hashed), folder / TRACE_NAME)
    write_columns(folder, record)
    return record


def write_columns(folder, record):
    """Of a run's report what needs no plots."""
    write_json(folder / "report.json", summarize(record, slo_ttft_s=None, slo_tpot_s=None))
    write_record(folder, record)
