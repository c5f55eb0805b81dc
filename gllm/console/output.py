"""Where a command's files go: prepared aside, moved in at the end, and only ever over files of our own."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gllm.report.decision_log import LOG_NAME
from gllm.report.files import RECORD_NAME, REPORT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACE_NAME = "trace.jsonl.gz"
"""The requests of a measured run as its engine saw them, in our own format."""

RUN_FILES = frozenset({"report.html", REPORT_NAME, RECORD_NAME, "requests.csv", "timeline.json", LOG_NAME, TRACE_NAME})
"""What a replay leaves in its folder; the trace only if the run was measured."""

COMPARISON_FILES = frozenset({"compare.html", "compare.json", "compare.csv", "runs"})
"""What a comparison leaves in its folder; `runs` holds a folder of `RUN_FILES` for each run."""

FIDELITY_FILES = frozenset({"fidelity.html", "fidelity.json", "timeline.json", LOG_NAME})
"""What a comparison of the twins leaves in its folder; the log is the simulated one."""

_ASIDE = ".gllm."


@contextmanager
def staged(out: Path, own: frozenset[str]) -> Iterator[Path]:
    """A folder to write into, whose contents become those of `out` unless there is an exception.

    Of an older run, files of the names in `own` are replaced or, where there is no new one, removed.

    Raises:
        ValueError: `out` is a file, or a folder with files of somebody else, or cannot be written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that the user wants kept
    _check(out, own)
    aside, made = _make_aside(out)
    try:
        yield aside
        _move(aside, out, own)
    except BaseException:
        _unmake(aside, made)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _check(out: Path, own: frozenset[str]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    foreign = next(_foreign(out, own), None) if out.is_dir() else None
    if foreign is not None:
        raise ValueError(
            f"--out {out}: holds {foreign.relative_to(out)}, which this command did not write; name another folder"
        )


def _foreign(out: Path, own: frozenset[str]) -> Iterator[Path]:
    """Whatever in the folder an earlier run of the command cannot have left."""
    for path in sorted(out.iterdir()):
        if path.name.startswith(_ASIDE):
            continue
        if path.name == "runs" and "runs" in own and path.is_dir():
            for run in sorted(path.iterdir()):
                yield from _foreign(run, RUN_FILES) if run.is_dir() else [run]
        elif path.name not in own or path.is_dir():
            yield path


def _make_aside(out: Path) -> tuple[Path, list[Path]]:
    """The folder to write into, inside `out`, and those that had to be made on the way to it."""
    _sweep(out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()][::-1]
    made: list[Path] = []
    aside = out / f"{_ASIDE}{os.getpid()}"
    try:
        for folder in missing:
            folder.mkdir()
            made.append(folder)
        aside.mkdir()
    except OSError as error:
        _unmake(aside, made)
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    return aside, made


def _sweep(out: Path) -> None:
    """Remove what a command left that was killed outright."""
    for folder in out.glob(f"{_ASIDE}*"):
        process = folder.name.removeprefix(_ASIDE)
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _unmake(aside: Path, made: list[Path]) -> None:
    """Leave no trace, except for what somebody else has put there since."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()


def _move(aside: Path, out: Path, own: frozenset[str]) -> None:
    for name in own:
        old, new = out / name, aside / name
        if old.is_dir():
            shutil.rmtree(old)
        elif not new.exists():
            old.unlink(missing_ok=True)
        if new.exists():
            new.replace(old)
