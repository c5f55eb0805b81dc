"""Real engines in real processes that must leave nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from gllm import LLM

_PATIENCE_S = 5.0
_MARK = "GLLM_TEST"


@contextmanager
def no_leaks():
    """Whatever starts inside must not outlive it: no process, even an orphan, no socket, no temporary file."""
    mark, folder = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="leak-"))
    environment = {_MARK: mark, "TMPDIR": str(folder)}
    with patch.dict(os.environ, environment), patch.object(tempfile, "tempdir", str(folder)):
        yield
    wait_until(lambda: not marked_processes(mark), lambda: f"still alive: {marked_processes(mark)}")
    left = [str(path) for path in folder.iterdir() if not path.name.startswith("torchinductor")]  # torch's own cache
    assert not left, left
    shutil.rmtree(folder)


def marked_processes(mark):
    """Command lines of all processes that were started with the mark in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"{_MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found


def wait_until(condition, explain=lambda: "it never came true"):
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@contextmanager
def engine(folder=None, **options):
    """An LLM over processes; at the end its cache must be empty, its requests forgotten, its processes gone."""
    options = {"device": "cpu", "block_size": 4, "max_num_seqs": 16} | options
    with no_leaks(), LLM(folder and str(folder), **options) as llm:
        yield llm
        wait_until_idle(llm)


def wait_until_idle(llm):
    """Until the engine says that it holds nothing."""

    def is_idle():
        notice = llm._client.receive(0)
        if notice is not None:
            llm._generations.deliver(notice)
        stats = llm._generations.stats
        return (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)

    assert not llm._generations._streams
    wait_until(is_idle, lambda: f"still busy: {llm._generations.stats}")
