"""Formats of traces, one reader each; a new one is one more line of `FORMATS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gllm.trace.errors import TraceError
from gllm.trace.fields import NS_PER_S, decimal_ns, iso_ns
from gllm.trace.formats.hashed import HashedFormat
from gllm.trace.formats.own import OwnFormat
from gllm.trace.formats.table import TableFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gllm.trace.request import TraceRequest


class Format(Protocol):
    """Knows one format by what its first line must hold, and reads it row by row."""

    @property
    def needs(self) -> Sequence[str]:
        """Columns or keys that no file of this format lacks."""

    def missing(self, first: str) -> list[str]:
        """Which of `needs` a file's first line lacks; the format matches where that is none."""

    def read(self, lines: Iterator[str]) -> Iterator[TraceRequest]:
        """The rows, lazily, with the times as the file counts them.

        Raises:
            TraceError: about the line read last, which the caller names.
        """


# Detection takes the first that lacks nothing, so a format stands before those it extends.
FORMATS: dict[str, Format] = {
    "gllm": OwnFormat(),
    "azure2025": TableFormat(
        needs=("TIMESTAMP", "NumImages", "ContextTokens", "GeneratedTokens"),
        arrival="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
        parse_time=iso_ns,
    ),
    "azure2023": TableFormat(
        needs=("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        arrival="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
        parse_time=iso_ns,
    ),
    "burstgpt": TableFormat(
        needs=("Timestamp", "Model", "Request tokens", "Response tokens"),
        arrival="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
        parse_time=decimal_ns,
    ),
    "vidur": TableFormat(
        needs=("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
        arrival="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        parse_time=decimal_ns,
    ),
    "lengths": TableFormat(
        needs=("num_prefill_tokens", "num_decode_tokens"),
        arrival=None,
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        parse_time=decimal_ns,
    ),
    "qwen": HashedFormat(
        needs=("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids"),
        unit_ns=NS_PER_S,
        block_size=16,
        chained=False,
    ),
    "mooncake": HashedFormat(
        needs=("timestamp", "input_length", "output_length", "hash_ids"),
        unit_ns=1_000_000,
        block_size=512,
        chained=True,
    ),
}


def pick_format(first: str, name: str | None) -> str:
    """The format of a file by its first line, or `name` itself if the file can be that.

    Raises:
        TraceError: names what is missing and which formats there are.
    """
    if name is None:
        matching = (known for known, reader in FORMATS.items() if not reader.missing(first))
        name = next(matching, None)
        if name is None:
            raise TraceError(f"no format has such a first line{_hint(first)}; name one of {', '.join(FORMATS)}")
        return name
    if name not in FORMATS:
        raise TraceError(f"unknown format {name!r}; name one of {', '.join(FORMATS)}")
    missing = FORMATS[name].missing(first)
    if missing:
        raise TraceError(f"format {name} needs {', '.join(missing)}, missing here; leave out the format to detect it")
    return name


def _hint(first: str) -> str:
    """What the likeliest format lacks, where any of it is there."""
    lacks = {name: reader.missing(first) for name, reader in FORMATS.items()}
    partial = [name for name, reader in FORMATS.items() if len(lacks[name]) < len(reader.needs)]
    if not partial:
        return ""
    name = min(partial, key=lambda name: len(lacks[name]))
    return f" (the closest, {name}, also needs {', '.join(lacks[name])})"
