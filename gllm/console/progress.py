"""How far a run is, on standard error; a thread looks now and then, the run itself pays nothing."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

from gllm.console.terminal import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REPORT_S = 10.0
_SELDOM_S = 5.0


@contextmanager
def show_progress(
    total: int, count: Callable[[], int], *, what: str = "requests", doing: str = "simulating"
) -> Iterator[None]:
    """While the block runs, show `count()` of `total`: a bar on a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        with _bar(total, count, what, doing):
            yield
    else:
        with _lines(total, count, what):
            yield


def tell_seldom(*, quiet: bool = False) -> Callable[[str], None]:
    """For steps that take a moment or minutes: a line on standard error now and then, none if all is done soon."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last > _SELDOM_S:
            last = time.monotonic()
            warn(text)

    return tell


@contextmanager
def _bar(total: int, count: Callable[[], int], what: str, doing: str) -> Iterator[None]:
    from rich.console import Console  # noqa: PLC0415 - the command line starts without it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    class Watching(Progress):
        def get_renderables(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
            for task in self.tasks:
                self.update(task.id, completed=count())
            return super().get_renderables()

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Watching(*columns, console=Console(stderr=True), refresh_per_second=4, transient=True) as progress:
        progress.add_task("", total=total)
        yield


@contextmanager
def _lines(total: int, count: Callable[[], int], what: str) -> Iterator[None]:
    over = Event()

    def tell() -> None:
        while not over.wait(_REPORT_S):
            warn(f"{count():,} of {total:,} {what} done")

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
