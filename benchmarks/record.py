"""What a result says of where it comes from, and how it is written: needs the standard library alone."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUT = Path("out", "benchmarks")
"""Where scripts write unless told otherwise: nothing gets into `results/` by itself."""

RUNTIME_PACKAGES = ("torch", "triton", "transformers")


def describe_run(packages: Iterable[str]) -> dict[str, Any]:
    """Date, command and machine: the head of every result.

    Args:
        packages: whose versions matter.
    """
    command = shlex.join(["python", *(_without_folders(word) for word in sys.argv)])
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "machine": machine(packages)}


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """Hardware and versions; `gpus` only where there are any."""
    cards = gpus()
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{package: version_of(package) for package in packages}},
        "commit": _commit(),
        **({"gpus": cards} if cards else {}),
    }


def gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each GPU that nvidia-smi tells of; none where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [dict(zip(("name", "memory", "driver"), line, strict=True)) for line in lines]


def version_of(package: str) -> str:
    """What is installed; a source tree on PYTHONPATH is "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit measured, "-dirty" if the tree differs from it in more than results; None without git."""
    try:
        commit = _git("describe", "--always")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout.strip()


def _without_folders(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def where(result: Mapping[str, Any]) -> str:
    """The GPUs of a result in words, else its CPU."""
    names = [card["name"] for card in result["machine"].get("gpus", ())]
    return f"{len(names)} x {names[0]}" if names else str(result["machine"]["cpu"])


def slug(*parts: object) -> str:
    """A file's name: `throughput`, `NVIDIA H200` -> `throughput_nvidia-h200`."""
    words = (re.sub(r"[^a-z0-9.]+", "-", str(part).lower()).strip("-") for part in parts if part)
    return "_".join(words)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, its folder too; what stood there is replaced at once, so that no crash leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The same on a terminal, columns aligned."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
