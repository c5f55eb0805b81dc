"""gLLM's own format: JSON lines under a header, lossless for `TraceRequest` (traces/SCHEMA.md)."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from gllm.trace.errors import TraceError
from gllm.trace.fields import integer, json_object, tokens
from gllm.trace.request import NO_EXTRA, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

VERSION = 1
_HEADER_KEYS = {"gllm_trace", "name", "description", "hash_block_size"}
_REQUIRED = ("num_prompt_tokens", "num_output_tokens")
_MAX_RUN = 1_000_000  # ids in one run: a typing error must not fill the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFormat:
    """Reads a header, then a request a line. Keys it does not know are errors, never dropped."""

    needs: tuple[str, ...] = ("gllm_trace",)

    def missing(self, first: str) -> list[str]:
        """`gllm_trace`, unless the first line is our header."""
        try:
            return [key for key in self.needs if key not in json_object(first)]
        except TraceError:
            return list(self.needs)

    def read(self, lines: Iterator[str]) -> Iterator[TraceRequest]:
        """All rows below the header."""
        defaults = _defaults(json_object(next(lines)))
        sizes = set()
        for line in lines:
            row = json_object(line)
            _check_keys(row, _FIELDS, _REQUIRED)
            request = TraceRequest(**{**defaults, **{key: _FIELDS[key](value, key) for key, value in row.items()}})
            if request.hash_ids and not request.hash_block_size:
                raise TraceError("has hash_ids, but neither it nor the header says hash_block_size")
            if request.hash_ids:
                sizes.add(request.hash_block_size)
            if len(sizes) > 1:
                raise TraceError(f"hash_block_size is {request.hash_block_size}, above it another; ids need one size")
            yield request


def _defaults(header: dict[str, Any]) -> dict[str, Any]:
    """What a row that does not say takes from the header."""
    if header["gllm_trace"] != VERSION:
        raise TraceError(f"gllm_trace is {shown(header['gllm_trace'])}; this reader knows version {VERSION}")
    _check_keys(header, _HEADER_KEYS)
    size = integer(header.get("hash_block_size", 0), "hash_block_size", 0)
    return {"arrival_ns": None, "hash_block_size": size}


def _check_keys(row: dict[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    lacking = [key for key in required if key not in row]
    if lacking:
        raise TraceError(f"has no {', '.join(lacking)}")
    unknown = sorted(set(row).difference(known))
    if unknown:
        raise TraceError(f"does not know the key {shown(unknown[0])}; other data goes under extra")


def _natural(value: object, key: str) -> int:
    return integer(value, key, 0)


def _positive(value: object, key: str) -> int:
    return integer(value, key, 1)


def _hash_ids(value: object, key: str) -> tuple[int, ...]:
    """Ids in order; a pair `[first, last]` stands for the run from first to last."""
    ids: list[int] = []
    for item in value if isinstance(value, list) else [None]:
        match item:
            case int() if type(item) is int:
                ids.append(item)
            case [first, last] if type(first) is type(last) is int and 0 <= last - first < _MAX_RUN:
                ids.extend(range(first, last + 1))
            case _:
                raise TraceError(f"{key} is {shown(value)}; it must be a list of integers and of runs [first, last]")
    return tuple(ids)


def _extra(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TraceError(f"{key} is {shown(value)}; it must be an object")
    return value or NO_EXTRA


_FIELDS: dict[str, Callable[[object, str], Any]] = {
    "arrival_ns": _natural,
    "num_prompt_tokens": tokens,
    "num_output_tokens": tokens,
    "hash_ids": _hash_ids,
    "hash_block_size": _natural,
    "priority": integer,
    "deadline_ns": _natural,
    "max_tokens": _positive,
    "extra": _extra,
}
