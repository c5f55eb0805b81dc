"""Decoding sequences, kept in groups that advance as one.

Sequences that decode together form a `DecodeGroup`. A step of the group is one integer; a member's
length is `offset + step`. Two small indexes name in advance the members that need something at a
given step: a new cache block (by phase of the block size) or their end (the length limit). So a
group that merely goes on costs the same whatever its size, and only joining, leaving and block
boundaries touch single members.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from gllm.core.plan import Joined
from gllm.core.request import NEVER, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gllm.core.kvcache import BlockPool
    from gllm.core.plan import Plan

Index = dict[int, dict[int, Sequence]]


def _unfile(index: Index, key: int, sequence: Sequence) -> None:
    bucket = index[key]
    del bucket[sequence.id]
    if not bucket:
        del index[key]


class DecodeGroup:
    """Sequences whose next steps are planned together.

    `notes` (step -> anything) belongs to the shell that drives the engine; the core never looks at it.
    """

    __slots__ = (
        "_block_size",
        "_ends",
        "_growth",
        "context",
        "joined",
        "last_plan",
        "left",
        "members",
        "notes",
        "ready",
        "step",
    )

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._growth: Index = {}  # step modulo block size -> members that then enter a new block
        self._ends: Index = {}  # step -> members that then reach their length limit
        self.members: dict[int, Sequence] = {}
        self.joined: dict[int, Sequence] = {}  # members that no plan of this group has stepped yet
        self.left: list[int] = []  # ids of those gone since the group's last plan, which stepped them
        self.step = 0
        self.context = 0  # sum of the members' lengths: what the next step attends to
        self.last_plan = NEVER
        self.ready = False
        self.notes: dict[int, Any] = {}

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence that is in no group and below its limit."""
        tokens, step = sequence.num_tokens, self.step
        key = sequence.id
        sequence.group = self
        sequence.join_step = step
        sequence.offset = offset = tokens - step
        self.members[key] = self.joined[key] = sequence
        self.context += tokens
        # The token fed at step s sits at position offset + s - 1; a multiple of the block size opens a block.
        self._growth.setdefault((1 - offset) % self._block_size, {})[key] = sequence
        self._ends.setdefault(sequence.limit - offset - 1, {})[key] = sequence

    def leave(self, sequence: Sequence) -> None:
        """Let go of a member; its count and its newest plan go with it."""
        offset = sequence.offset
        tokens = offset + self.step
        sequence.last_plan = sequence.newest_plan()
        del self.members[sequence.id]
        if self.joined.pop(sequence.id, None) is None:
            self.left.append(sequence.id)
        self.context -= tokens
        _unfile(self._growth, (1 - offset) % self._block_size, sequence)
        end = sequence.limit - offset - 1
        if end >= self.step:  # otherwise `advance` has just taken it out of the index
            _unfile(self._ends, end, sequence)
        sequence.settle(tokens)

    def growing(self) -> dict[int, Sequence] | tuple[()]:
        """Members that the next step takes into a new block."""
        return self._growth.get(self.step % self._block_size, ())

    def advance(self, plan: Plan, pool: BlockPool) -> None:
        """Plan one step of every member: give out blocks, let go of those that reach their limit."""
        step = plan.step = self.step
        members = self.members
        plan.group = self
        plan.num_decode_tokens = count = len(members)
        plan.decode_context = context = self.context
        plan.previous = self.last_plan
        if self.joined:
            plan.joined = [
                Joined(s, s.last_plan, s.offset + step - s.request.num_prompt_tokens) for s in self.joined.values()
            ]
            self.joined = {}
        if self.left:
            plan.left, self.left = self.left, []
        growing = self._growth.get(step % self._block_size)
        if growing is not None:
            grown = []
            for sequence, block in zip(growing.values(), pool.allocate(len(growing))):  # noqa: B905 - as many
                sequence.blocks.append(block)
                grown.append((sequence, block))
            plan.grown = grown
        self.context = context + count
        self.step = step + 1
        self.last_plan = plan.id
        if step in self._ends:
            plan.ending = list(self._ends.pop(step).values())
            for sequence in plan.ending:
                self.leave(sequence)


class Rotation:
    """Groups whose next step may be planned, in the order in which they came back."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._groups: deque[DecodeGroup] = deque()
        self.num_ready = 0

    def add(self, group: DecodeGroup) -> None:
        """Put a group that came back at the end of the line; an empty one is dropped."""
        if group.members:
            group.ready = True
            self._groups.append(group)
            self.num_ready += len(group.members)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its group, ready or on the road."""
        group = sequence.group
        assert group is not None
        group.leave(sequence)
        if group.ready:
            self.num_ready -= 1
            if not group.members:
                self._groups.remove(group)

    def count_blocks(self, count: int) -> int:
        """New blocks that the next `count` steps of the rotation need at most."""
        need = 0
        for group in self._groups:
            if count <= 0:
                break
            size = len(group.members)
            need += min(count, len(group.growing()))
            count -= size
        return need

    def take(self, count: int) -> DecodeGroup:
        """Form one group of the next `count` sequences, 1 <= count <= num_ready.

        Whole groups are merged into the largest. When the last one is cut, its first members stay
        behind or go along, whichever moves fewer; who stays behind is next in line.
        """
        self.num_ready -= count
        first = self._groups.popleft()
        size = len(first.members)
        if size == count:  # by far the most common: a group goes round and round
            first.ready = False
            return first
        chosen = [first]
        while size < count:
            chosen.append(self._groups.popleft())
            size += len(chosen[-1].members)
        if size > count:
            chosen[-1] = self._cut(chosen[-1], size - count)
        return self._merge(chosen)

    def bring_forward(self, sequences: Iterable[Sequence]) -> None:
        """Put just these ready sequences, as one group, at the head of the line."""
        group = DecodeGroup(self._block_size)
        for sequence in sequences:
            self.leave(sequence)
            group.join(sequence)
        self.add(group)
        self._groups.rotate(1)

    def _cut(self, group: DecodeGroup, excess: int) -> DecodeGroup:
        """Split `excess` members off; queue the rest at the front, return what goes along."""
        other = DecodeGroup(self._block_size)
        going = len(group.members) - excess
        for sequence in list(group.members.values())[: min(excess, going)]:
            group.leave(sequence)
            other.join(sequence)
        stays, goes = (other, group) if excess <= going else (group, other)
        stays.ready = True
        self._groups.appendleft(stays)
        return goes

    @staticmethod
    def _merge(groups: list[DecodeGroup]) -> DecodeGroup:
        largest = max(groups, key=lambda group: len(group.members))
        largest.ready = False
        for group in groups:
            if group is not largest:
                for sequence in list(group.members.values()):
                    group.leave(sequence)
                    largest.join(sequence)
        return largest

    def __iter__(self) -> Iterator[DecodeGroup]:
        """Ready groups, the longest waiting first."""
        return iter(self._groups)
