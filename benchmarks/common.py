"""What the simulator's benchmarks share: the workload, a yardstick for the machine, and where results go."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record
import simpy
from record import RESULTS, ROOT

from gllm.core import engine
from gllm.trace import load_trace

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from gllm.trace import Trace

PUBLIC_TRACE = Path(os.environ.get("GLLM_TRACES", ROOT.parent / "shared" / "traces"), "azure2023_conv.csv.gz")
SAMPLE_TRACE = "chat"

TOKEN_BUDGET = 512
MAX_NUM_SEQS = 128
BLOCK_SIZE = 16
NUM_BLOCKS = 28_000
MAX_TOTAL_TOKENS = 4096  # prompt and output of one request


def pick_trace(path: str | None) -> str:
    """The trace asked for, else the public one, else a shipped sample; says so if it had to fall back."""
    if path is not None:
        return path
    if PUBLIC_TRACE.exists():
        return str(PUBLIC_TRACE)
    print(f"{PUBLIC_TRACE.name} is not here (--trace PATH names it): using the shipped sample `{SAMPLE_TRACE}` instead")
    return SAMPLE_TRACE


def read_workload(trace: str, num_requests: int) -> Trace:
    """The lengths of a trace, looped to `num_requests`, each clipped to 4096 tokens, all there at t = 0."""
    return load_trace(trace, repeat=0, limit=num_requests, max_total_tokens=MAX_TOTAL_TOKENS, arrivals="burst")


def _tick(env: simpy.Environment, count: int) -> Generator[simpy.Event, Any, None]:
    for _ in range(count):
        yield env.timeout(1)


def calibrate(count: int = 200_000) -> dict[str, float]:
    """How fast this machine is right now: plain Python steps and simpy timeouts per CPU second, best of three."""
    python_s, simpy_s = [], []
    for _ in range(3):
        started = time.process_time()
        table = dict.fromkeys(range(64), 0)
        for number in range(count):
            table[number & 63] += number
        python_s.append(time.process_time() - started)
        env = simpy.Environment()
        env.process(_tick(env, count))
        started = time.process_time()
        env.run()
        simpy_s.append(time.process_time() - started)
    return {"python_steps_per_s": count / min(python_s), "simpy_timeouts_per_s": count / min(simpy_s)}


def describe_run() -> dict[str, Any]:
    """Date, command and machine: the head of every result."""
    described = record.describe_run(("gllm", "simpy", "numpy", "pandas"))
    return {**described, "machine": {**described["machine"], "build": build()}}


def build() -> str:
    """Whether the hot modules of this installation were compiled (setup.py)."""
    return "plain" if engine.__file__.endswith(".py") else "compiled"


def run_json(command: Sequence[str], **options: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Run a command; its last line on standard output is JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def write_results(name: str, result: Mapping[str, Any], title: str, body: Iterable[str]) -> None:
    """Write `results/NAME.json` and `.md`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"# {title}", "", *_head(result), "", *body, ""])
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: benchmarks/results/{name}.json, {name}.md")


def _head(result: Mapping[str, Any]) -> list[str]:
    host = result["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in host["versions"].items())
    return [
        f"- {result['date']}, commit {host['commit'] or 'unknown'}",
        f"- {host['cpu']}, {host['num_cores']} cores, {host['memory_gib']} GiB; {versions}; {host['build']} build",
        f"- `{result['command']}`",
    ]
