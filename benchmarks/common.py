"""What the benchmarks share: the workload, a yardstick for the machine, and where results go."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import simpy

from gllm.core import engine
from gllm.trace import load_trace

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from gllm.trace import Trace

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    versions = {"python": platform.python_version()}
    for package in ("gllm", "simpy", "numpy", "pandas"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
        "build": build(),
    }


def build() -> str:
    """Whether the hot modules of this installation were compiled (setup.py)."""
    return "plain" if engine.__file__.endswith(".py") else "compiled"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit measured; "-dirty" if the tree differs from it in more than these results."""
    try:
        commit = _git("describe", "--always")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout.strip()


def run_json(command: Sequence[str], **options: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Run a command; its last line on standard output is JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def describe_run() -> dict[str, Any]:
    """Date, command and machine: the head of every result."""
    command = shlex.join(["python", *(_without_folders(word) for word in sys.argv)])
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "machine": machine()}


def _without_folders(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


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


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
