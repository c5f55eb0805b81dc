"""A child process of ours: a module run by this Python, told what to do on its standard input.

The pipe stays open for as long as the parent lives; when it closes, the child ends. So no process outlives the
one that started it, however that one died. (multiprocessing's spawn would run the user's script again.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")

_QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # one line says what died, and it is ours; torch reads this once, early


def start(module: str, task: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401 - any value that msgspec encodes
    """Run `python -m module`; the child finds `task` with `read_task`."""
    environment = {**_QUIET, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # What a child prints is for people: only the parent's own words are results. Its process group is its own: a
    # terminal's Ctrl-C is the parent's business.
    child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=2, env=environment, process_group=0
    )
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it is dead already, which whoever watches over it will see and tell
        child.stdin.write(msgspec.json.encode(task) + b"\n")
        child.stdin.flush()
    return child


def read_task(kind: type[_T]) -> _T:
    """What the parent wants done. Whoever reads it, and whatever it forks, ignores interrupts from here on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pkill may send all of us one: it is the parent that drains
    # Unbuffered, and not through sys.stdin: a fork must inherit no lock of it.
    with open(os.dup(0), "rb", buffering=0) as task:  # noqa: PTH123 - a descriptor
        return msgspec.json.decode(task.readline(), type=kind)


def how(status: int) -> str:
    """In words: how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def end(child: subprocess.Popen[bytes], patience_s: float) -> int:
    """Let a child end by itself, then make it; return its exit status."""
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
    try:
        return child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
