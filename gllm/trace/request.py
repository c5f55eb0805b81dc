"""A trace in memory: `TraceRequest`, one row, and `Trace`, all of them in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NO_EXTRA: Mapping[str, Any] = {}
"""Shared by every request whose source row held nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace: when it comes, how long it is, and what its prompt shares with others.

    `hash_ids` name the prompt's blocks of `hash_block_size` tokens and are chained: equal ids mean
    equal blocks after equal prefixes. The last one may name a partly filled block.
    `num_output_tokens` is the true length, which a scheduler must not see; `max_tokens` is what
    the client allowed. `extra` keeps the rest of the source row as it was.
    """

    arrival_ns: int | None  # since the trace's start; None: the file has lengths only
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    hash_block_size: int = 0  # tokens; 0: unknown
    priority: int = 0  # smaller is more urgent
    deadline_ns: int | None = None  # for the first token, on the clock of `arrival_ns`
    max_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: NO_EXTRA, hash=False)

    def block_hashes(self, block_size: int) -> tuple[int, ...]:
        """Chained hashes of the prompt's full blocks of `block_size` tokens, exact for any size.

        The block that ends before token `e` is named by the trace block that its last token lies
        in and by that token's place there: `id * hash_block_size + place`. The list stops where
        the prompt or `hash_ids` end.
        """
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; a block holds at least 1 token")
        ids, size = self.hash_ids, self.hash_block_size
        num_tokens = min(self.num_prompt_tokens, len(ids) * size)
        num_blocks = num_tokens // block_size
        if not num_blocks:
            return ()
        if size % block_size == 0:
            first = block_size - 1
            used = ids[: -(-num_tokens // size)]
            runs = (range(i * size + first, (i + 1) * size, block_size) for i in used)
            return tuple(chain.from_iterable(runs))[:num_blocks]
        lasts = range(block_size - 1, num_blocks * block_size, block_size)
        return tuple(ids[last // size] * size + last % size for last in lasts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival, the first at 0 ns; `notes` tell the user what was changed."""

    name: str
    format: str
    requests: Sequence[TraceRequest]
    notes: tuple[str, ...] = ()
