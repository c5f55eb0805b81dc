"""Vidur and gLLM side by side: the same requests, the same limits, CPU time of each one's loop.

    VIDUR_HOME=/path/to/vidur python benchmarks/vidur.py [--trace PATH] [--requests 10000] [--pp 1,4]

`VIDUR_HOME` is a checkout of microsoft/vidur with an environment of its own: `VIDUR_PYTHON`, else
`$VIDUR_HOME/.venv/bin/python`. Without it this says so and ends well.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    MAX_TOTAL_TOKENS,
    NUM_BLOCKS,
    TOKEN_BUDGET,
    calibrate,
    describe_run,
    pick_trace,
    read_workload,
    run_json,
    write_results,
)
from record import table
from sim_speed import Case, measure_apart

if TYPE_CHECKING:
    from gllm.trace import Trace

MODEL = "meta-llama/Meta-Llama-3-8B"  # the shape of Llama 3.1 8B
DEVICE, NETWORK = "a100", "a100_dgx"
"""Vidur ships no timings of this model on H100. With everything queued at the start, which batches are
formed does not depend on how long they take, and so neither does the work of simulating them."""


def write_trace(trace: Trace, path: Path) -> None:
    """The requests as Vidur reads them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arrived_at", "num_prefill_tokens", "num_decode_tokens"])
        writer.writerows((0.0, row.num_prompt_tokens, row.num_output_tokens) for row in trace.requests)


def vidur_options(trace: Path, outputs: Path, pp: int, device: str, network: str) -> list[str]:
    """Vidur's flags for the workload: Sarathi, one replica, metrics off."""
    values = {
        "replica_config_model_name": MODEL,
        "replica_config_device": device,
        "replica_config_network_device": network,
        "replica_config_tensor_parallel_size": 1,
        "replica_config_num_pipeline_stages": pp,
        "cluster_config_num_replicas": 1,
        "request_generator_config_type": "trace_replay",
        "trace_request_generator_config_trace_file": trace,
        "trace_request_generator_config_max_tokens": MAX_TOTAL_TOKENS,
        "replica_scheduler_config_type": "sarathi",
        "sarathi_scheduler_config_chunk_size": TOKEN_BUDGET,
        "sarathi_scheduler_config_batch_size_cap": MAX_NUM_SEQS,
        "sarathi_scheduler_config_block_size": BLOCK_SIZE,
        "sarathi_scheduler_config_num_blocks": NUM_BLOCKS,
        "execution_time_predictor_config_type": "linear_regression",
        "metrics_config_output_dir": outputs,
        "log_level": "warning",
    }
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    off = ("write_metrics", "write_json_trace", "enable_chrome_trace", "store_plots", "store_request_metrics")
    off += ("store_batch_metrics", "store_utilization_metrics")
    return [*options, *(f"--no-metrics_config_{name}" for name in off)]


def run_vidur(home: Path, python: Path, trace: Trace, options: argparse.Namespace, pp: int) -> dict[str, Any]:
    """One Vidur simulation in a process of its own."""
    loop = Path(__file__).with_name("vidur_loop.py")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "requests.csv"
        write_trace(trace, rows)
        flags = vidur_options(rows, Path(folder) / "out", pp, options.device, options.network)
        environment = os.environ | {"PYTHONPATH": str(home), "WANDB_MODE": "disabled"}
        measured: dict[str, Any] = run_json([str(python), str(loop), *flags], cwd=home, env=environment)
    num_requests = len(trace.requests)
    return {
        **measured,
        "requests_per_s": num_requests / measured["loop_s"],
        "iterations_per_s": measured["num_iterations"] / measured["loop_s"],
    }


def compare(home: Path, python: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both simulators on each pipeline depth."""
    source = pick_trace(options.trace)
    trace = read_workload(source, options.requests)
    pairs = []
    for pp in options.pp:
        print(f"PP {pp}: gLLM, then Vidur", file=sys.stderr)
        ours = measure_apart(Case(trace=source, pp=pp, num_requests=options.requests), repeats=3)
        pairs.append({"pp": pp, "gllm": ours, "vidur": run_vidur(home, python, trace, options, pp)})
    return pairs


def report(pairs: list[dict[str, Any]]) -> list[str]:
    """The results' page below its head."""
    header = ["PP", "", "requests/s", "iterations/s", "iterations", "loop s"]
    rows = [
        [
            f"{pair['pp']}",
            name,
            f"{run['requests_per_s']:,.0f}",
            f"{run['iterations_per_s']:,.0f}",
            f"{run['num_iterations']:,}",
            f"{run['loop_s']:.2f}",
        ]
        for pair in pairs
        for name, run in (("gLLM", pair["gllm"]), ("Vidur", pair["vidur"]))
    ]
    first = pairs[0]["gllm"]
    ratios = (f"PP {p['pp']}: {p['gllm']['requests_per_s'] / p['vidur']['requests_per_s']:.1f}" for p in pairs)
    return [
        f"{first['num_requests']:,} requests, lengths of `{first['trace']}`, clipped to {MAX_TOTAL_TOKENS} tokens,",
        f"all queued at t = 0; Sarathi with {TOKEN_BUDGET} tokens, {MAX_NUM_SEQS} sequences, {NUM_BLOCKS:,} blocks of",
        f"{BLOCK_SIZE}. CPU seconds of the loop; all of gLLM's metrics on, Vidur's off.",
        "",
        *table(header, rows),
        "",
        f"gLLM's requests/s over Vidur's: {', '.join(ratios)}.",
    ]


def find_python(home: Path) -> Path:
    """Vidur's Python.

    Raises:
        ValueError: it is not where it should be.
    """
    python = Path(os.environ.get("VIDUR_PYTHON") or home / ".venv" / "bin" / "python").absolute()
    if not (home / "vidur" / "main.py").is_file():
        raise ValueError(f"VIDUR_HOME={home}: no vidur/main.py there; it must be a checkout of microsoft/vidur")
    if not python.is_file():
        raise ValueError(f"{python}: not there; set VIDUR_PYTHON to the Python that Vidur is installed for")
    return python


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Run both, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="PATH", help="lengths to use; default: azure2023_conv, else a sample")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--pp", type=_numbers, default=[1, 4], metavar="N,N")
    parser.add_argument("--device", default=DEVICE, help="whose timings Vidur reads; default: %(default)s")
    parser.add_argument("--network", default=NETWORK, help="Vidur's network device; default: %(default)s")
    options = parser.parse_args()
    if not os.environ.get("VIDUR_HOME"):
        print("VIDUR_HOME is not set, so Vidur was not run; see benchmarks/README.md for what it needs")
        return 0
    home = Path(os.environ["VIDUR_HOME"]).absolute()
    try:
        python = find_python(home)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        pairs = compare(home, python, options)
    except subprocess.CalledProcessError as error:
        print(f"Vidur's run ended with status {error.returncode}; what it said stands above", file=sys.stderr)
        return 1
    result = {**describe_run(), "calibration": calibrate(), "pairs": pairs}
    write_results("vidur", result, "gLLM and Vidur side by side", report(pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
