"""How fast the simulator runs: CPU time of its loop, memory, and how soon the command is up.

Each case runs in a process of its own, so that its peak memory is its own:

    python benchmarks/sim_speed.py [--trace PATH] [--requests 10000,100000] [--pp 1,4] [--repeats 3] [--ahead]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from common import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    TOKEN_BUDGET,
    build,
    calibrate,
    describe_run,
    pick_trace,
    read_workload,
    run_json,
    write_results,
)
from record import table

from gllm.parallel import Parallel
from gllm.report.metrics import summarize
from gllm.sim.config import SimConfig
from gllm.sim.run import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL, GPU = "llama-3.1-8b", "h100"
POLICY = f"sarathi:token_budget={TOKEN_BUDGET}"
GOAL_REQUESTS_PER_S = 20_000
GOAL_PEAK_MB = 300
GOAL_START_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation of the benchmark's workload."""

    trace: str
    pp: int
    num_requests: int
    ahead: int = 0


def configure(pp: int, ahead: int = 0) -> SimConfig:
    """The configuration of the benchmark, with `pp` stages and so many micro-batches planned ahead.

    None are, by default, as in all figures of this benchmark since the first.
    """
    return SimConfig(
        max_in_flight=pp + ahead,
        model=MODEL,
        gpu=GPU,
        parallel=Parallel(pp=pp),
        policy=POLICY,
        max_num_seqs=MAX_NUM_SEQS,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
    )


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process.

    `loop_s` is CPU time of the simulation itself, with everything recorded and no decision log;
    `metrics_s` of computing the report's numbers from the record, `read_s` of reading the trace;
    `peak_mb` is the process's highest memory use.
    """
    yardstick = calibrate()
    started = time.process_time()
    trace = read_workload(case.trace, case.num_requests)
    read_s = time.process_time() - started
    started = time.thread_time()  # the loop is one thread; numpy's idle ones are not its cost
    record = simulate(configure(case.pp, case.ahead), trace)
    loop_s = time.thread_time() - started
    summary = summarize(record, slo_ttft_s=None, slo_tpot_s=None)
    metrics_s = time.thread_time() - started - loop_s
    num_iterations = len(record.batches)
    assert summary["num_finished"] == case.num_requests, "not every request was served"
    return {
        **asdict(case),
        "trace": trace.name,
        "read_s": read_s,
        "loop_s": loop_s,
        "metrics_s": metrics_s,
        "num_iterations": num_iterations,
        "requests_per_s": case.num_requests / loop_s,
        "iterations_per_s": num_iterations / loop_s,
        "simulated_s": summary["duration_s"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "calibration": yardstick,
        "iterations_per_simpy_timeout": num_iterations / loop_s / yardstick["simpy_timeouts_per_s"],
        "requests_per_1000_simpy_timeouts": 1000 * case.num_requests / loop_s / yardstick["simpy_timeouts_per_s"],
    }


def measure_apart(case: Case, repeats: int) -> dict[str, Any]:
    """Run one case several times, each in a fresh process; the quickest, with the times of all."""
    spec = json.dumps(asdict(case))
    runs = [run_json([sys.executable, str(Path(__file__)), "--case", spec]) for _ in range(repeats)]
    best = min(runs, key=lambda run: run["loop_s"])
    return {**best, "all_loop_s": [run["loop_s"] for run in runs], "peak_mb": max(run["peak_mb"] for run in runs)}


def start_s(repeats: int = 5) -> float | None:
    """Median wall time until `python -m gllm.sim replay` opens its trace; None if it cannot tell.

    The trace does not exist, so the command starts, reads its options, tries to open it and ends with
    status 2: an upper bound, since leaving is in it too.
    """
    command = [sys.executable, "-m", "gllm.sim", "replay", "no-such-trace.csv", "--model", MODEL, "--gpu", GPU]
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        times.append(time.perf_counter() - started)
        if done.returncode != 2 or "no-such-trace.csv" not in done.stderr:
            return None
    return median(times)


def rows(cases: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the results' table."""
    return [
        [
            f"{case['pp']}",
            f"{case['num_requests']:,}",
            f"{case['requests_per_s']:,.0f}",
            f"{case['iterations_per_s']:,.0f}",
            f"{case['num_iterations']:,}",
            f"{case['loop_s']:.2f}",
            f"{case['metrics_s']:.2f}",
            f"{case['peak_mb']:.0f}",
            f"{case['iterations_per_simpy_timeout']:.3f}",
            f"{case['calibration']['simpy_timeouts_per_s'] / 1e6:.2f}",
        ]
        for case in cases
    ]


def report(cases: Sequence[dict[str, Any]], start: float | None) -> list[str]:
    """The results' page below its head."""
    header = ["PP", "requests", "requests/s", "iterations/s", "iterations", "loop s", "metrics s", "peak MB"]
    header += ["iterations per simpy timeout", "simpy timeouts, M/s"]
    opened = f"opens its trace after {start:.2f} s" if start is not None else "could not be timed"
    return [
        f"Lengths of `{cases[0]['trace']}`, looped, clipped to 4096 tokens, all queued at t = 0; {MODEL} on {GPU},",
        f"`{POLICY}`, at most {MAX_NUM_SEQS} sequences, {NUM_BLOCKS:,} blocks of {BLOCK_SIZE}; iteration log off, all",
        f"metrics on. Times are CPU seconds, the best of {len(cases[0]['all_loop_s'])} runs.",
        f"Goals: {GOAL_REQUESTS_PER_S:,} requests/s; 100,000 requests in under {GOAL_PEAK_MB} MB.",
        "",
        *table(header, rows(cases)),
        "",
        "The last two columns make machines comparable: how many iterations the simulator does in the time of one bare",
        "simpy timeout, and how many such timeouts per second this machine did just before.",
        "",
        f"`python -m gllm.sim replay` {opened} (goal: below {GOAL_START_S:.0f} s).",
    ]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="PATH", help="lengths to use; default: azure2023_conv, else a sample")
    parser.add_argument("--requests", type=_numbers, default=[10_000, 100_000], metavar="N,N")
    parser.add_argument("--pp", type=_numbers, default=[1, 4], metavar="N,N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--ahead", action="store_true", help="plan one micro-batch ahead, as replay does")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    trace = pick_trace(options.trace)
    cases = []
    for num_requests in options.requests:
        for pp in options.pp:
            print(f"PP {pp}, {num_requests:,} requests", file=sys.stderr)
            case = Case(trace=trace, pp=pp, num_requests=num_requests, ahead=int(options.ahead))
            cases.append(measure_apart(case, options.repeats))
    start = start_s()
    result = {**describe_run(), "cases": cases, "start_s": start}
    name = "sim_speed" + ("" if build() == "plain" else "_compiled") + ("_ahead" if options.ahead else "")
    title = f"Speed of the simulator, {build()} build" + (", planning ahead" if options.ahead else "")
    write_results(name, result, title, report(cases, start))


if __name__ == "__main__":
    main()
