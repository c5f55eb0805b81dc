"""A measurement of an engine: what its result begins with, where it is written, and the engine's start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import BACKENDS, start
from model_folder import model_name
from record import OUT, RUNTIME_PACKAGES, describe_run, slug

from gllm.console.terminal import warn

if TYPE_CHECKING:
    import argparse

    from engines import Engine, EngineOptions

_TOLD = ("pp", "tp", "ep", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "dtype", "load_format")


def add_out(group: argparse._ArgumentGroup) -> None:
    """--out."""
    group.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the result (default: {OUT})")


def describe(benchmark: str, backend: str, options: EngineOptions, folder: Path) -> dict[str, Any]:
    """The head of a result: date, command, machine, engine and model."""
    layers = {} if options.pp_layers is None else {"pp_layers": list(options.pp_layers)}
    extra = {"engine": dict(options.extra)} if options.extra else {}
    return {
        **describe_run(dict.fromkeys((*RUNTIME_PACKAGES, BACKENDS[backend].package))),
        "benchmark": benchmark,
        "backend": backend,
        "model": model_name(folder),
        "options": {name: getattr(options, name) for name in _TOLD} | layers | extra,
    }


def result_file(out: Path, result: dict[str, Any]) -> Path:
    """`BENCHMARK_BACKEND_MODEL[_SPLIT]_GPU.json` in a folder."""
    split = "".join(f"{name}{result['options'][name]}" for name in ("pp", "tp", "ep") if result["options"][name] > 1)
    cards = result["machine"].get("gpus")
    place = cards[0]["name"] if cards else "cpu"
    return out / f"{slug(result['benchmark'], result['backend'], result['model'], split, place)}.json"


def timed_start(backend: str, options: EngineOptions, result: dict[str, Any]) -> Engine:
    """Start an engine and let it answer one token; `result` gets `start_s`, the seconds that took."""
    started = time.perf_counter()
    engine = start(backend, options)
    try:
        engine.generate([[1]], [1])
    except BaseException:
        engine.close()
        raise
    result["start_s"] = round(time.perf_counter() - started, 2)
    warn(f"{backend} answers after {result['start_s']} s")
    return engine
