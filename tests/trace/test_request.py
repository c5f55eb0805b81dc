from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm.trace import TraceRequest
from gllm.trace.request import NO_EXTRA


def request_of(num_prompt_tokens, hash_ids, size):
    return TraceRequest(
        arrival_ns=0,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=1,
        hash_ids=tuple(hash_ids),
        hash_block_size=size,
    )


def by_definition(request, block_size):
    ids, size = request.hash_ids, request.hash_block_size
    covered = min(request.num_prompt_tokens, len(ids) * size)
    ends = range(block_size, covered + 1, block_size)
    return tuple(ids[(e - 1) // size] * size + (e - 1) % size for e in ends)


@given(
    st.integers(0, 300),
    st.lists(st.integers(0, 2**70), max_size=12),
    st.sampled_from([0, 1, 4, 6, 16, 32]),
    st.integers(1, 70),
)
def test_block_hashes_are_the_formula_for_any_sizes(num_prompt_tokens, hash_ids, size, block_size):
    request = request_of(num_prompt_tokens, hash_ids, size)
    assert request.block_hashes(block_size) == by_definition(request, block_size)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 12))
def test_equal_hashes_mean_equal_prefixes(contents, size, block_size):
    """Chained ids of two prompts that part somewhere: their hashes part in the same block."""
    other = [*contents[:-1], 3]
    numbers: dict[tuple[int, ...], int] = {}

    def chained(blocks):
        return [numbers.setdefault(tuple(blocks[: n + 1]), len(numbers)) for n in range(len(blocks))]

    num_tokens = len(contents) * size
    ours = request_of(num_tokens, chained(contents), size).block_hashes(block_size)
    theirs = request_of(num_tokens, chained(other), size).block_hashes(block_size)
    num_shared = (len(contents) - 1) * size // block_size
    assert ours[:num_shared] == theirs[:num_shared]
    assert not set(ours[num_shared:]) & set(theirs)
    assert len(set(ours)) == len(ours) == num_tokens // block_size


def test_block_hashes_stop_where_ids_or_prompt_end():
    assert request_of(100, [7, 8], 16).block_hashes(16) == (7 * 16 + 15, 8 * 16 + 15)
    assert request_of(31, [7, 8], 16).block_hashes(16) == (7 * 16 + 15,)
    assert request_of(1000, [], 16).block_hashes(16) == ()
    assert request_of(1000, [], 0).block_hashes(16) == ()
    with pytest.raises(ValueError, match="block_size is 0"):
        request_of(100, [7], 16).block_hashes(0)


def test_requests_are_values():
    one = request_of(10, [1], 16)
    assert one == request_of(10, [1], 16)
    assert hash(one) == hash(request_of(10, [1], 16))
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - sweeps send traces to other processes
    assert one.extra is NO_EXTRA
