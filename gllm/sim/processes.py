"""Runs side by side, each in a process of its own."""

from __future__ import annotations

import signal
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.resource_tracker import ensure_running
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess


class Job(Protocol):
    """What a process is sent; it must pickle."""

    @property
    def name(self) -> str:
        """As the user knows it; no two of a set have the same."""

    def run(self) -> dict[str, Any]:
        """Carry it out. A user's mistakes are ValueErrors."""


def run_all(jobs: Sequence[Job], num_processes: int, ended: list[str] | None = None) -> dict[str, dict[str, Any] | str]:
    """Run the jobs, so many at once; for each name what it came to, or in one line why there is none.

    Names of jobs that are over are added to `ended` as it happens. However this ends, no process is left.
    """
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    outcomes: dict[str, dict[str, Any] | str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                job = waiting.pop()
                with _uninterrupted():
                    connection, process = _start()
                    running[connection] = job.name, process
                with suppress(ConnectionError):  # killed already: its end of the pipe will say so
                    connection.send(job)
            ready = set(wait(running))
            for connection in [connection for connection in running if connection in ready]:
                name, process = running.pop(connection)
                outcomes[name] = _outcome(connection, process)
                if ended is not None:
                    ended.append(name)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return {job.name: outcomes[job.name] for job in jobs}


def _start() -> tuple[Connection, BaseProcess]:
    """A process that waits for its job."""
    context = get_context("spawn")  # fork would copy the progress bar's thread and its locks
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the end of the block; processes started in it never see one."""
    pending: list[int] = []
    ensure_running()  # of the resource tracker, which would undo the mask when it starts
    handler = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a child inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if pending:
        raise KeyboardInterrupt


def _child(connection: Connection) -> None:
    """A run's process: takes a job, sends what it came to or what went wrong."""
    try:
        connection.send(connection.recv().run())
    except Exception as error:  # noqa: BLE001 - one failing run must not stop the others
        known = isinstance(error, ValueError | OSError) or type(error).__name__ in {"PlanError", "StallError"}
        text = " ".join(str(error).split())
        connection.send(text if known else f"{type(error).__name__}: {text}")


def _outcome(connection: Connection, process: BaseProcess) -> dict[str, Any] | str:
    try:
        outcome: dict[str, Any] | str = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        outcome = f"its process was killed (status {process.exitcode}); try fewer --jobs"
    process.join()
    return outcome
