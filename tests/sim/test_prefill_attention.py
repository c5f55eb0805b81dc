"""Attention of chunks, corrected by the schedule of its kernel: nothing at the tables' points, elsewhere a formula."""

from itertools import product
from math import fsum

import pytest
from sim import profiles
from sim.profiles import CHUNK_KERNEL, QUERIES, SHAPE, STARTS, TOKEN_GRAPHS, contents, profile, step

from gllm.chunk_schedule import ChunkKernel, duration
from gllm.graph_sizes import MAX_CHUNKS
from gllm.sim.gpus import get_gpu
from gllm.sim.profiled import Profiled

KERNEL = ChunkKernel(**CHUNK_KERNEL)
NUM_BLOCKS = 500  # for no more than 16 chunks at the start, 8000 tokens
LAYERS = SHAPE.num_layers


def model(folder, values, gpu="h200"):
    return Profiled(profile=profile(folder, values), shape=SHAPE, gpu=get_gpu(gpu))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return model(tmp_path_factory.mktemp("plain"), contents())


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    return model(tmp_path_factory.mktemp("scheduled"), contents(chunk_kernel=CHUNK_KERNEL, num_blocks=NUM_BLOCKS))


def prefill_ns(cost, chunks, contexts=()):
    (found,) = cost.components(step(chunks, contexts))["prefill_attention"]
    return found


def in_base_chunks(num_tokens):
    size = max(64, -(-num_tokens // MAX_CHUNKS)) if num_tokens <= TOKEN_GRAPHS[-1] else 64
    num_whole, rest = divmod(num_tokens, size)
    return duration(KERNEL, [(0, size)] * num_whole + [(0, rest)] * (rest > 0))


def base(num_tokens):
    """In a graph of the next size; beyond graphs on the line between the points of `tokens`."""
    if num_tokens <= TOKEN_GRAPHS[-1]:
        return in_base_chunks(profiles.padded(num_tokens, TOKEN_GRAPHS))
    points = [point for point in profiles.TOKENS if point > TOKEN_GRAPHS[-1]]
    right = next(point for point in points if point >= num_tokens)
    left = max((point for point in points if point <= num_tokens), default=right)
    share = (num_tokens - left) / max(right - left, 1)
    return in_base_chunks(left) * (1 - share) + in_base_chunks(right) * share


def alone(query, start):
    return duration(KERNEL, [(start, query)]) - base(query)


def num_each(query, start):
    return max(1, min(16, profiles.TOKENS[-1] // query, NUM_BLOCKS // -(-(start + query) // 16)))


def each(query, start):
    num = num_each(query, start)
    return (duration(KERNEL, [(start, query)] * num) - base(num * query)) / num


def tile_ns():
    """The slope, by least squares of relative errors, over times above 20 us a layer."""
    points = list(product(QUERIES, STARTS))
    shares = [alone(*at) / profiles.one(*at) for at in points if profiles.one(*at) > 20_000 * LAYERS]
    assert 1 < len(shares) < len(points)
    return fsum(shares) / fsum(share * share for share in shares)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_tokens", QUERIES)
def test_a_point_of_the_tables_is_as_measured(plain, scheduled, num_tokens, start):
    chunks = [(start, num_tokens)]
    assert prefill_ns(scheduled, chunks) == pytest.approx(prefill_ns(plain, chunks), abs=1e-3)
    several = chunks * num_each(num_tokens, start)
    if num_tokens < 256 and fsum(each(num, at) for at, num in several) >= alone(num_tokens, start):
        assert prefill_ns(scheduled, several) == pytest.approx(prefill_ns(plain, several), abs=1e-3)


def between(formula, query, start, queries=(64, 256), starts=(0, 512)):
    """On lines between four points."""
    share, far = (query - queries[0]) / (queries[1] - queries[0]), (start - starts[0]) / (starts[1] - starts[0])
    ends = [formula(num, starts[0]) * (1 - far) + formula(num, starts[1]) * far for num in queries]
    return ends[0] * (1 - share) + ends[1] * share


@pytest.mark.parametrize(("num_tokens", "start"), [(100, 0), (64, 300), (129, 511), (200, 77)])
def test_a_chunk_between_the_points(plain, scheduled, num_tokens, start):
    chunks = [(start, num_tokens)]
    beyond = duration(KERNEL, chunks) - base(num_tokens) - between(alone, num_tokens, start)
    assert abs(beyond) > 0.1
    expected = prefill_ns(plain, chunks) + tile_ns() * beyond
    assert prefill_ns(scheduled, chunks) == pytest.approx(expected)


@pytest.mark.parametrize("chunks", [[(300, 100), (0, 70)], [(0, 65)] * 7, [(511, 255), (0, 90), (0, 64)]])
@pytest.mark.parametrize("num_decode", [0, 1, 8])
def test_several_chunks_beside_decodes(plain, scheduled, chunks, num_decode):
    points = [(num, start) for start, num in chunks]
    read = max(*(between(alone, *point) for point in points), fsum(between(each, *point) for point in points))
    held = base(sum(num for num, _ in points) + num_decode)
    if num_decode:  # `mixed` is beyond base chunks of these tokens, and one of them was there
        held -= base(64 + num_decode) - base(64)
    expected = prefill_ns(plain, chunks) + tile_ns() * (duration(KERNEL, chunks) - held - read)
    assert prefill_ns(scheduled, chunks, [20] * num_decode) == pytest.approx(expected)


@pytest.mark.parametrize("num_decode", profiles.BATCHES)
def test_a_point_of_mixed_steps_is_as_measured(plain, scheduled, num_decode):
    work = step([(0, 64)], [1024] * num_decode)
    assert scheduled.stage_ns(work) == plain.stage_ns(work)


def test_beyond_the_tables_both_readings_go_on_alike(plain, scheduled):
    last_ns, beyond_ns = (prefill_ns(plain, [(start, 64)]) for start in (2048, 9000))
    tiles = duration(KERNEL, [(9000, 64)]) - base(64) - alone(64, 2048) * beyond_ns / last_ns
    assert abs(tiles) > 1
    assert prefill_ns(scheduled, [(9000, 64)]) == pytest.approx(beyond_ns + tile_ns() * tiles)
    told = [note for note in scheduled.notes if "before a chunk" in note]
    assert len(told) == 1  # of times alone


def test_a_profile_without_long_times_is_read_as_it_is(tmp_path):
    prefill = contents()["prefill_attention"]
    prefill = {**prefill, "one_ns": [[20_000] * 3] * 4}
    values = contents(prefill_attention=prefill)
    both = [model(tmp_path, {**values, "chunk_kernel": kernel}) for kernel in (None, CHUNK_KERNEL)]
    one, other = (prefill_ns(cost, [(300, 100)]) for cost in both)
    assert one == other == 20_000


def test_another_gpu_has_another_schedule(tmp_path):
    values = contents(chunk_kernel=CHUNK_KERNEL)
    both = [model(tmp_path, {**values, "chunk_kernel": kernel}, gpu="h100") for kernel in (None, CHUNK_KERNEL)]
    one, other = (prefill_ns(cost, [(300, 100)]) for cost in both)
    assert one == other
