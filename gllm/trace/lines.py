"""Where a trace comes from: a path, standard input or a shipped sample, as counted lines of text."""

from __future__ import annotations

import gzip
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gllm.trace.errors import TraceError
from gllm.trace.samples import find_sample, list_samples

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

_GZIP_MAGIC = b"\x1f\x8b"


class Lines:
    """Lines of text without their ends, blank ones left out; `number` is the last one's row in the file."""

    __slots__ = ("_raw", "name", "number")

    def __init__(self, raw: Iterable[bytes], name: str) -> None:
        self._raw = iter(raw)
        self.name = name
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = ""
        while not text:
            raw = self._next_raw()
            self.number += 1
            text = _decoded(raw).strip("\r\n\ufeff" if self.number == 1 else "\r\n")
            text = text if text.strip() else ""
        return text

    def _next_raw(self) -> bytes:
        try:
            return next(self._raw)
        except EOFError:
            raise TraceError("the gzip data ends early; fetch the file again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"the gzip data is damaged ({error}); fetch the file again") from None
        except OSError as error:
            raise TraceError(f"cannot be read: {error.strerror or error}") from None


@contextmanager
def open_lines(source: str | os.PathLike[str]) -> Iterator[Lines]:
    """The lines of `source`, unzipped where they start like gzip, whatever the file is called."""
    name = "standard input" if source == "-" else str(source)
    if source == "-":
        yield Lines(_unzipped(sys.stdin.buffer), name)
        return
    with _open(name) as stream:
        yield Lines(_unzipped(stream), name)


def trace_name(source: str | os.PathLike[str]) -> str:
    """What reports call the trace: the file's name without its endings."""
    if source == "-":
        return "stdin"
    return Path(Path(source).name.removesuffix(".gz")).stem


def _open(name: str) -> IO[bytes]:
    """Opens a file, else the sample of that name, so that a folder called `chat` hides no sample."""
    sample = find_sample(name)
    try:
        if sample is not None and not Path(name).is_file():
            return sample.open("rb")
        return Path(name).open("rb")
    except FileNotFoundError:
        known = ", ".join(sample.name for sample in list_samples()) or "none installed"
        raise TraceError(f"{name}: no such file, and no such sample (samples: {known})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TraceError(f"{name!r}: cannot be opened: {reason}") from None


def _unzipped(stream: IO[bytes]) -> Iterable[bytes]:
    peek = getattr(stream, "peek", None)  # every buffered reader has one; the type IO does not say so
    if peek is not None and peek(2)[:2] == _GZIP_MAGIC:
        return gzip.GzipFile(fileobj=stream)
    return stream


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TraceError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8 text") from None
