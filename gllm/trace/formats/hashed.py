"""Traces of JSON lines whose prompts are named block by block: Mooncake's and Qwen-Bailian's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gllm.trace.errors import TraceError
from gllm.trace.fields import decimal_ns, integers, json_object, tokens
from gllm.trace.request import NO_EXTRA, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedFormat:
    """Reads one object a line; `chained` ids name a block and all before it, others the block alone."""

    needs: tuple[str, ...]
    unit_ns: int  # of a timestamp
    block_size: int  # tokens that an id names
    chained: bool

    def missing(self, first: str) -> list[str]:
        """Keys that the first row lacks."""
        try:
            row = json_object(first)
        except TraceError:
            row = {}
        return [key for key in self.needs if key not in row]

    def read(self, lines: Iterator[str]) -> Iterator[TraceRequest]:
        """All rows; keys other than the four that every such trace has are kept in `extra`."""
        chain = tuple if self.chained else _chainer()
        for line in lines:
            row = json_object(line)
            lacking = [key for key in self.needs if key not in row]
            if lacking:
                raise TraceError(f"has no {', '.join(lacking)}")
            yield self._request(row, chain)

    def _request(self, row: dict[str, Any], chain: Callable[[tuple[int, ...]], tuple[int, ...]]) -> TraceRequest:
        return TraceRequest(
            arrival_ns=decimal_ns(row.pop("timestamp"), "timestamp", self.unit_ns),
            num_prompt_tokens=tokens(row.pop("input_length"), "input_length"),
            num_output_tokens=tokens(row.pop("output_length"), "output_length"),
            hash_ids=chain(integers(row.pop("hash_ids"), "hash_ids")),
            hash_block_size=self.block_size,
            extra=row or NO_EXTRA,
        )


def _chainer() -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Turns ids of contents into ids of prefixes: a number for each (prefix, content) seen so far."""
    numbers: dict[tuple[int, int], int] = {}

    def chain(contents: tuple[int, ...]) -> tuple[int, ...]:
        prefix = -1
        return tuple(prefix := numbers.setdefault((prefix, content), len(numbers)) for content in contents)

    return chain
