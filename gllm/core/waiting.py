"""The queue of sequences that hold no cache, in the order a policy chose."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gllm.core.decision import Order
    from gllm.core.request import Sequence

Entry = tuple[tuple[int, ...], int, "Sequence"]


class WaitingQueue:
    """A sorted list with a moving head: ends are O(1), the middle is a binary search and a memmove."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._entries: list[Any] = []  # of Entry; None before the head
        self._head = 0

    def __len__(self) -> int:
        return len(self._entries) - self._head

    def __iter__(self) -> Iterator[Sequence]:
        """Sequences, the most urgent first."""
        entries = self._entries
        for index in range(self._head, len(entries)):  # islice would walk over what lies before the head
            yield entries[index][2]

    def add(self, sequence: Sequence) -> None:
        """File a sequence behind its equals that arrived before it."""
        entries, head = self._entries, self._head
        entry = self._entry(sequence)
        if head and entry < entries[head]:  # a preempted sequence: usually older than all that wait
            self._head = head - 1
            entries[head - 1] = entry
        else:
            insort(entries, entry, lo=head)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        entries, head = self._entries, self._head
        index = head if entries[head][2] is sequence else bisect_left(entries, self._entry(sequence), lo=head)
        if index - head < len(entries) - index:  # close up from the nearer end
            entries[head + 1 : index + 1] = entries[head:index]
            entries[head] = None
            self._head = head + 1
            if self._head * 2 > len(entries):
                del entries[: self._head]
                self._head = 0
        else:
            del entries[index]

    def _entry(self, sequence: Sequence) -> Entry:
        return (self._order.key(sequence.request), sequence.id, sequence)
