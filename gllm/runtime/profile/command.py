"""`profile`: starts the workers of an engine, has them compute steps made by hand, and writes a file of their times."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.console.progress import tell_seldom
from gllm.console.terminal import say, say_table
from gllm.gpu_names import gpu_name
from gllm.graph_sizes import graph_sizes, has_token_graphs, token_graph_sizes
from gllm.runtime.options import runtime_config
from gllm.runtime.versions import versions

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from gllm.core import Limits
    from gllm.model_shape import ModelShape
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.engine.workers import Workers
    from gllm.runtime.model_config import ModelConfig
    from gllm.runtime.profile.grids import Room

    Profile = dict[str, Any]


def profile(args: Namespace) -> int:
    """Measure, write, and print the gist; return the exit status."""
    config = _config(args)
    model = config.check()
    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with _aside(args.out) as aside:
        found = _measured(args, config, model)
        aside.write_text(_to_json(found), encoding="utf-8")
        path = Path(args.out or _name(found))
        aside.replace(path)
    _show(found)
    say(f"profile {path}")
    return 0


def _config(args: Namespace) -> RuntimeConfig:
    config = runtime_config(args, record="")  # whoever keeps a record keeps time
    if config.nodes.num_nodes > 1:
        raise ValueError("profile compares clocks of one machine; leave --nnodes out")
    if args.max_tokens_per_step is not None:
        # What a worker sets memory aside for is its policy's largest step.
        config = replace(config, policy=f"sarathi:token_budget={args.max_tokens_per_step}")
    return config


@contextmanager
def _aside(out: str | None) -> Iterator[Path]:
    """A file to write, beside the one that it becomes; removed unless it has.

    Raises:
        ValueError: There cannot be one.
    """
    folder = Path(out).parent if out else Path()
    aside = folder / f".gllm.{os.getpid()}"
    if out and Path(out).is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")
    try:
        aside.touch()
    except OSError as error:
        raise ValueError(f"--out {out or folder}: cannot be written ({error.strerror}); name another file") from None
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def _measured(args: Namespace, config: RuntimeConfig, model: ModelConfig) -> Profile:
    """The whole file."""
    from gllm.runtime.profile.host import measure_intake  # noqa: PLC0415 - --help must not wait for it, nor mistakes
    from gllm.runtime.profile.profiler import take_profile  # noqa: PLC0415

    start_s = time.monotonic()
    intake_ns = measure_intake()
    with started_workers(config) as workers:
        limits, device = workers.load(tell_seldom(quiet=args.quiet))
        tables = take_profile(
            workers,
            room(config, model.shape, limits, device),
            policy=config.policy,
            vocab_size=model.shape.vocab_size,
            intake_ns=intake_ns,
            on_gpu=device != "cpu",
            quick=args.quick,
            quiet=args.quiet,
        )
        kernel = workers.chunk_kernel
    made = _made(round(time.monotonic() - start_s))
    known = {"num_blocks": limits.num_blocks, "made": made, "chunk_kernel": kernel and asdict(kernel)}
    return {**_described(config, model, device), **known, **tables}


def room(config: RuntimeConfig, shape: ModelShape, limits: Limits, device: str) -> Room:
    """What a step may hold, and which ones workers capture."""
    from gllm.policy import parse_policy  # noqa: PLC0415
    from gllm.runtime.profile.grids import Room  # noqa: PLC0415

    max_tokens = parse_policy(config.policy).max_batch_tokens(limits)
    if device == "cpu" or not config.cuda_graphs:
        return Room(limits=limits, max_tokens=max_tokens)
    is_captured = has_token_graphs(_attention_backend(config, device))
    return Room(
        limits=limits,
        max_tokens=max_tokens,
        graph_sizes=tuple(graph_sizes(limits.max_num_seqs)),
        token_graph_sizes=tuple(token_graph_sizes(max_tokens, shape, config.parallel.tp)) if is_captured else (),
        skips_padding=shape.is_moe,
    )


def _attention_backend(config: RuntimeConfig, device: str) -> str:
    if config.attention_backend != "auto":
        return config.attention_backend
    return "triton" if device != "cpu" and find_spec("triton") else "torch"


@contextmanager
def started_workers(config: RuntimeConfig) -> Iterator[Workers]:
    """Workers that end with the block, soon if there is an exception."""
    import zmq  # noqa: PLC0415

    from gllm.runtime.channels import Addresses  # noqa: PLC0415
    from gllm.runtime.engine.workers import Workers  # noqa: PLC0415

    folder = tempfile.mkdtemp(prefix="gllm-")
    context = zmq.Context()
    workers = Workers(config, context, Addresses.within(Path(folder)).workers, folder)
    try:
        yield workers
        workers.end()
    except BaseException:
        workers.kill()
        raise
    finally:
        context.destroy(linger=0)
        shutil.rmtree(folder, ignore_errors=True)


def _described(config: RuntimeConfig, model: ModelConfig, device: str) -> Profile:
    """What was measured."""
    parallel = config.parallel
    dtype = "float32" if device == "cpu" else model.dtype
    return {
        "format": "gllm-profile",
        "version": 1,
        "model": config.model_name,
        "model_shape": asdict(model.shape),
        "gpu": gpu_name(device),
        "device": device,
        "parallel": {"pp": parallel.pp, "tp": parallel.tp, "ep": parallel.ep},
        "dtype": dtype if config.dtype == "auto" else config.dtype,
        "block_size": config.block_size,
        "attention_backend": _attention_backend(config, device),
        "layers": model.shape.num_layers,
    }


def _made(seconds: int) -> Profile:
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "gllm.runtime", *words]),
        "seconds": seconds,
        "versions": versions(),
    }


def _name(found: Profile) -> str:
    layout = [f"{key}{size}" for key, size in found["parallel"].items() if size > 1]
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower())
    return "_".join(["profile", found["model"], *layout, device]) + ".json"


def _to_json(found: Profile) -> str:
    """A line for each field, so that people can look at it."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in found.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _show(found: Profile) -> None:
    from rich import box  # noqa: PLC0415 - the command line starts without it
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"{found['model']} on {found['device']}", box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("part", style="cyan")
    table.add_column("ms", justify="right")
    for name, ns in gist(found):
        table.add_row(name, f"{ns / 1e6:.3f}")
    say_table(table)


def gist(found: Profile) -> list[tuple[str, int]]:
    """A few of a profile's figures, ns."""
    head = "head" if found["graph_head"] is None else "graph_head"
    wanted = (("decode", "batches", 1), ("decode", "batches", 64), ("tokens", "tokens", 2048), (head, "rows", 1))
    rows = [_nearest(found, *point) for point in wanted]
    gap, host = found["gap"], found["host"]
    rows += [("gap of decode steps", gap["decode_ns"]), ("gap of others", gap["chunked_ns"])]
    rows += [(name, host[f"{name}_ns"]) for name in ("intake", "dispatch", "return")]
    return list(dict.fromkeys(rows))


def _nearest(found: Profile, table: str, points: str, at: int) -> tuple[str, int]:
    point, ns = min(zip(found[table][points], found[table]["ns"], strict=True), key=lambda pair: abs(pair[0] - at))
    return f"{table}({point})", ns
