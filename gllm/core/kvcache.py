"""The paged KV cache's book-keeping: which block is whose, and which content can be reused.

A block is in exactly one place: free, private to one sequence, or shared. A shared block carries
the chained hash of its content and a reference count; at zero references it stays readable in an
LRU list until its room is needed. Tails are released before heads, so a prefix is evicted from its
end (PagedAttention, arXiv 2309.06180; hash chaining as in vLLM's automatic prefix caching).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 .. num_blocks-1 of `block_size` tokens each.

    `version` changes whenever the answer of `match` or `count_evictable` could.
    """

    def __init__(self, num_blocks: int, block_size: int, *, sharing: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"the cache needs at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sharing = sharing
        self.version = 0
        self.num_free = num_blocks  # can be allocated now, by eviction if need be
        self.num_common = 0  # blocks that more than one sequence holds
        self.num_repeats = 0  # references to them beyond one for each
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block first
        self._block_of: dict[int, int] = {}  # hash -> block
        self._hash_of: dict[int, int] = {}  # block -> hash
        self._references: dict[int, int] = {}  # shared block -> sequences that hold it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # shared, unreferenced; oldest first

    def allocate(self, count: int) -> list[int]:
        """Take `count` >= 1 private blocks; the caller has checked `num_free`."""
        free = self._free
        self.num_free -= count
        if count > len(free):
            self._evict(count - len(free))
        blocks = free[-count:]
        del free[-count:]
        return blocks

    def match(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Shared blocks that hold the longest known prefix of `hashes`, at most `limit`."""
        block_of = self._block_of
        found: list[int] = []
        for content in hashes[:limit]:
            block = block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def count_evictable(self, blocks: Iterable[int]) -> int:
        """How many of these shared blocks nobody holds: taking them uses up free room."""
        evictable = self._evictable
        return sum(block in evictable for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of these shared blocks."""
        references = self._references
        for block in blocks:
            count = references[block]
            if count == 0:
                del self._evictable[block]
                self.num_free -= 1
            else:
                self.num_repeats += 1
                self.num_common += count == 1
            references[block] = count + 1
        self.version += 1

    def share(self, blocks: Sequence[int], hashes: Sequence[int], start: int, stop: int) -> None:
        """Publish private blocks[start:stop] under hashes[start:stop].

        Content that another block already holds stays private: two sequences computed it at once.
        """
        if not self.sharing or start >= stop:
            return
        for index in range(start, stop):
            content = hashes[index]
            if content not in self._block_of:
                block = blocks[index]
                self._block_of[content] = block
                self._hash_of[block] = content
                self._references[block] = 1
        self.version += 1

    def release(self, blocks: Sequence[int], num_hashed: int) -> None:
        """Give back a sequence's blocks, of which only the first `num_hashed` may be shared."""
        if not num_hashed:
            self._free += blocks
            self.num_free += len(blocks)
            return
        before = len(self._evictable) + len(self._free)
        self._free += blocks[num_hashed:]
        references = self._references
        for index in range(num_hashed - 1, -1, -1):
            block = blocks[index]
            count = references.get(block)
            if count is None:
                self._free.append(block)
                continue
            references[block] = count - 1
            if count == 1:
                self._evictable[block] = None
            else:
                self.num_repeats -= 1
                self.num_common -= count == 2
        self.num_free += len(self._evictable) + len(self._free) - before
        self.version += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """Unpublish what these blocks hold, their computation having failed.

        A block that somebody else has hit since stays findable while it has holders: whoever drives
        the engine ends them too, for their steps read what was never written.
        """
        for block in blocks:
            if block in self._hash_of and self._references[block] == 1:
                del self._block_of[self._hash_of.pop(block)]
                del self._references[block]
        self.version += 1

    def _evict(self, count: int) -> None:
        for _ in range(count):
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
            del self._references[block]
            self._free.append(block)
        self.version += 1

    def check_invariants(self, holders: Iterable[Sequence[int]]) -> None:
        """Walk the pool against the block tables of all sequences; raise AssertionError on a leak."""
        held: dict[int, int] = {}
        for table in holders:
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                held[block] = held.get(block, 0) + 1
        free = set(self._free)
        assert len(free) == len(self._free), "a block freed twice"
        assert self.num_free == len(free) + len(self._evictable), "free blocks miscounted"
        assert not free & held.keys(), "a free block is held"
        assert not free & self._references.keys(), "a free block is shared"
        for block, count in self._references.items():
            assert held.get(block, 0) == count, f"block {block}: {count} references, {held.get(block, 0)} holders"
            assert (count == 0) == (block in self._evictable), f"block {block} evictable with {count} references"
            assert self._block_of[self._hash_of[block]] == block, f"block {block}: hash points elsewhere"
        repeated = [count for count in self._references.values() if count > 1]
        assert self.num_common == len(repeated), "blocks with several holders miscounted"
        assert self.num_repeats == sum(repeated) - len(repeated), "repeated references miscounted"
        assert len(self._block_of) == len(self._hash_of) == len(self._references), "hash tables differ"
        private = [block for block in held if block not in self._references]
        assert all(held[block] == 1 for block in private), "a private block has two holders"
        assert len(free) + len(self._references) + len(private) == self.num_blocks, "a block leaked"
