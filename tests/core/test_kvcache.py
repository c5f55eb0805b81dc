"""The block pool against a model so simple that it is right: lists of holders, and one list in order of age."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gllm.core import BlockPool

TOPICS = 3
LENGTH = 6
CONTENTS = [topic * 100 + index for topic in range(TOPICS) for index in range(LENGTH)]


class Table:
    """One sequence's blocks, and the hashes that its content has."""

    def __init__(self, topic):
        self.hashes = [topic * 100 + index for index in range(LENGTH)]
        self.blocks = []
        self.num_hashed = 0


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, hit, compute, publish, fail and go."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, 4)
        self.tables = []
        self.block_of = {}  # what is published, and where
        self.lru = []  # contents nobody holds, the oldest first
        self.before = None

    def references(self, content):
        return sum(self.block_of[content] in table.blocks for table in self.tables)

    def held(self):
        return {block for table in self.tables for block in table.blocks}

    def num_unused(self):
        return self.pool.num_blocks - len(self.held() | set(self.block_of.values()))

    def answers(self):
        """All that `match` and `count_evictable` can be asked about one block."""
        found = [tuple(self.pool.match([content], 1)) for content in CONTENTS]
        return found, [self.pool.count_evictable(blocks) for blocks in found]

    def remember(self):
        self.before = (self.pool.version, self.answers())

    @rule(topic=st.integers(0, TOPICS - 1), hit=st.booleans())
    def arrive(self, topic, hit):
        """Take what the cache knows of a prompt."""
        self.remember()
        table = Table(topic)
        if hit:
            table.blocks = self.pool.match(table.hashes, LENGTH)
            self.pool.acquire(table.blocks)
            table.num_hashed = len(table.blocks)
            self.lru = [content for content in self.lru if self.block_of[content] not in table.blocks]
        self.tables.append(table)

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(data=st.data())
    def grow(self, data):
        self.remember()
        table = data.draw(st.sampled_from(self.tables))
        count = data.draw(st.integers(1, self.pool.num_free))
        held, num_unused = self.held(), self.num_unused()
        evicted = self.lru[: max(0, count - num_unused)]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not held & set(blocks), "a held block was given away"
        for content in evicted:
            self.lru.remove(content)
            assert self.block_of.pop(content) in blocks
        assert not set(self.block_of.values()) & set(blocks), "evicted out of turn"
        table.blocks += blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data):
        self.remember()
        table = data.draw(st.sampled_from(self.tables))
        stop = data.draw(st.integers(0, min(LENGTH, len(table.blocks))))
        self.pool.share(table.blocks, table.hashes, table.num_hashed, stop)
        for index in range(table.num_hashed, stop):
            self.block_of.setdefault(table.hashes[index], table.blocks[index])
        table.num_hashed = max(stop, table.num_hashed)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), failed=st.booleans())
    def leave(self, data, failed):
        self.remember()
        table = data.draw(st.sampled_from(self.tables))
        if failed:
            self.pool.forget(table.blocks[: table.num_hashed])
            own = [content for content in table.hashes if self.block_of.get(content) in table.blocks]
            for content in own:
                if self.references(content) == 1:
                    del self.block_of[content]
        self.tables.remove(table)
        self.pool.release(table.blocks, table.num_hashed)
        for content in reversed(table.hashes):
            if self.block_of.get(content) in table.blocks and not self.references(content):
                self.lru.append(content)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fail_but_stay(self, data):
        """Unpublished blocks keep their holders."""
        self.remember()
        table = data.draw(st.sampled_from(self.tables))
        self.pool.forget(table.blocks[: table.num_hashed])
        for content in table.hashes:
            if self.block_of.get(content) in table.blocks and self.references(content) == 1:
                del self.block_of[content]

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "pool"):
            self.pool.check_invariants([table.blocks for table in self.tables])
            assert self.pool.num_free == self.num_unused() + len(self.lru)

    @invariant()
    def contents_are_where_the_model_says(self):
        if hasattr(self, "pool"):
            for content in CONTENTS:
                expected = [self.block_of[content]] if content in self.block_of else []
                assert self.pool.match([content], 1) == expected
                assert self.pool.count_evictable(expected) == (content in self.lru)

    @invariant()
    def the_version_tells_of_changes(self):
        if hasattr(self, "pool") and self.before is not None:
            version, answers = self.before
            assert version != self.pool.version or answers == self.answers()

    def teardown(self):
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.release(table.blocks, table.num_hashed)
            assert self.pool.num_free == self.pool.num_blocks
            assert len(set(self.pool.allocate(self.pool.num_blocks))) == self.pool.num_blocks


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def shared(pool, hashes):
    """Blocks with this content, published and held."""
    blocks = pool.allocate(len(hashes))
    pool.share(blocks, hashes, 0, len(hashes))
    return blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_room_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def test_all_blocks_can_be_had_once():
    assert sorted(BlockPool(5, 4).allocate(5)) == [0, 1, 2, 3, 4]


def test_a_freed_block_is_used_again():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.release(blocks, 0)
    assert sorted(pool.allocate(2)) == sorted(blocks)


def test_match_is_the_longest_prefix():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1, 2, 3])
    assert pool.match([1, 2, 9, 3], 4) == blocks[:2]


def test_match_stops_at_its_limit():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1, 2, 3])
    assert pool.match([1, 2, 3], 2) == blocks[:2]


def test_a_released_content_can_still_be_matched():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1, 2])
    pool.release(blocks, 2)
    assert (pool.match([1, 2], 2), pool.num_free) == (blocks, 4)


def test_a_prefix_is_evicted_from_its_end():
    pool = BlockPool(3, 4)
    blocks = shared(pool, [1, 2, 3])
    pool.release(blocks, 3)
    assert pool.allocate(1) == blocks[2:]
    assert pool.match([1, 2, 3], 3) == blocks[:2]


def test_the_least_recently_used_content_is_evicted_first():
    pool = BlockPool(2, 4)
    first, second = shared(pool, [1]), shared(pool, [2])
    pool.release(first, 1)
    pool.release(second, 1)
    pool.acquire(first)
    pool.release(first, 1)
    assert pool.allocate(1) == second


def test_what_someone_holds_is_not_evicted():
    pool = BlockPool(3, 4)
    blocks = shared(pool, [1])
    pool.acquire(blocks)
    pool.release(blocks, 1)
    pool.allocate(2)
    assert (pool.num_free, pool.match([1], 1)) == (0, blocks)


def test_a_duplicate_stays_private_and_is_freed_as_such():
    pool = BlockPool(4, 4)
    first, second = shared(pool, [1]), shared(pool, [1])
    assert pool.match([1], 1) == first
    pool.release(second, 1)
    pool.check_invariants([first])
    assert pool.count_evictable(first) == 0


def test_count_evictable_counts_what_nobody_holds():
    pool = BlockPool(4, 4)
    kept, left = shared(pool, [1]), shared(pool, [2, 3])
    pool.release(left, 2)
    assert pool.count_evictable(kept + left) == 2


def test_a_forgotten_content_is_gone_but_keeps_its_holder():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1])
    pool.forget(blocks)
    assert pool.match([1], 1) == []
    pool.check_invariants([blocks])


def test_a_content_that_others_hold_is_not_forgotten():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1])
    pool.acquire(blocks)
    pool.forget(blocks)
    assert pool.match([1], 1) == blocks


def test_a_pool_that_does_not_share_publishes_nothing():
    pool = BlockPool(4, 4, sharing=False)
    shared(pool, [1, 2])
    assert pool.match([1, 2], 2) == []


def test_what_several_hold_is_counted():
    pool = BlockPool(4, 4)
    blocks = shared(pool, [1, 2])
    assert (pool.num_common, pool.num_repeats) == (0, 0)
    pool.release(blocks, 2)
    pool.acquire(blocks)
    assert (pool.num_common, pool.num_repeats) == (0, 0)  # one holder again
    pool.acquire(blocks[:1])
    pool.acquire(blocks)
    assert (pool.num_common, pool.num_repeats) == (2, 3)
    pool.release(blocks[:1], 1)
    assert (pool.num_common, pool.num_repeats) == (2, 2)
    pool.release(blocks, 2)
    assert (pool.num_common, pool.num_repeats) == (0, 0)
    pool.release(blocks, 2)
    assert pool.num_free == 4


def lose_a_block(_, blocks):
    return blocks[1:]


def free_a_held_block(pool, blocks):
    pool.release(blocks[:1], 0)
    return blocks


def free_twice(pool, blocks):
    pool.release(blocks, 0)
    pool.release(blocks, 0)
    return []


def hold_twice(_, blocks):
    return [*blocks, blocks[0]]


def drop_a_reference(pool, blocks):
    pool.share(blocks, [1], 0, 1)
    pool.release(blocks[:1], 1)
    return blocks


def miscount_common_blocks(pool, blocks):
    pool.num_common += 1
    return blocks


def miscount_repeats(pool, blocks):
    pool.num_repeats += 1
    return blocks


@pytest.mark.parametrize(
    "damage",
    [
        *(lose_a_block, free_a_held_block, free_twice, hold_twice, drop_a_reference),
        *(miscount_common_blocks, miscount_repeats),
    ],
)
def test_check_invariants_notices(damage):
    pool = BlockPool(4, 4)
    table = damage(pool, pool.allocate(2))
    with pytest.raises(AssertionError):
        pool.check_invariants([table])


def test_check_invariants_notices_a_private_block_in_two_tables():
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="two holders"):
        pool.check_invariants([blocks, blocks])
