"""Files that are either whole or absent."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPORT_NAME = "report.json"
RECORD_NAME = "record.npz"


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file that appears under its name only once it is complete.

    It is written beside its place under a temporary name and then renamed;
    after an error the temporary file is gone and an older `path` is as it was.
    """
    with _aside(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """The same for a file of bytes."""
    with _aside(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` at the end of the block, unless there is an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
