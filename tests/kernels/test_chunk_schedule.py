"""The simulator's schedule of chunk attention cuts as the kernel's plan does."""

import random

import pytest
import torch
from gllm_kernels import chunk_plan
from gllm_kernels.chunk_plan import count_places, default_tuning, plan_chunks

from gllm.chunk_schedule import MOST_PARTS, ChunkKernel, duration, find_cut, listed, parts_of_blocks

torch.set_num_threads(1)

SHAPES = [(1, 8), (2, 2), (2, 8), (3, 4), (4, 2), (4, 8), (7, 4), (8, 2), (8, 4), (8, 8)]


@pytest.fixture(autouse=True)
def gpu(request, monkeypatch):
    width = getattr(request, "param", 132)
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: width)
    return width


def kernel_of(group, heads, *, width=132):
    tuning = default_tuning(128, torch.bfloat16)
    return ChunkKernel(
        rows=tuning.rows,
        tile=tuning.tile,
        least_tiles=tuning.least_tiles,
        places=count_places(tuning, heads, torch.device("cpu")),
        kv_heads=heads,
        group_size=group,
        multiprocessors=width,
    )


def planned(chunks, group, heads):
    """First row and number of parts of each of the plan's blocks, by chunk."""
    counts = torch.tensor([count for _, count in chunks])
    plan = plan_chunks(
        torch.cat((counts[:1] * 0, counts.cumsum(0))).int(),
        torch.tensor([start + count for start, count in chunks]).int(),
        torch.zeros(1, dtype=torch.int32),
        max_tokens=int(counts.sum()),
        max_chunks=len(chunks),
        group_size=group,
        num_kv_heads=heads,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    return [(s, row, parts) for s, row, part, parts, _ in plan.entries_J5.tolist() if s >= 0 and not part]


def draw_chunks(generator):
    """As schedulers make them: first those that go on, then whole prompts; and any others."""
    most = generator.choice((64, 512, 2048, 8192))
    longest = generator.choice((0, 500, 4000, 40_000))

    def draw(high):
        return int((high + 1) ** generator.random())

    chunks = [(generator.randint(0, longest), draw(most)) for _ in range(generator.choice((1, 1, 1, 2, 3, 6)))]
    chunks += [(0, draw(most)) for _ in range(generator.choice((0, 0, 1, 3)))]
    return chunks[::-1] if generator.random() < 0.3 else chunks  # as after a hit in the prefix cache


@pytest.mark.parametrize(("group", "heads"), SHAPES)
@pytest.mark.parametrize("gpu", [132, 108, 58], indirect=True)
def test_blocks_are_cut_as_the_kernel_cuts_them(group, heads, gpu):
    kernel, generator = kernel_of(group, heads, width=gpu), random.Random(group * heads)
    num_cut = 0
    for _ in range(80):
        chunks = draw_chunks(generator)
        expected = planned(chunks, group, heads)
        seen = [(chunks[s][0] + row // group + 1) // kernel.tile for s, row, _ in expected]
        found = parts_of_blocks(kernel, find_cut(kernel, chunks), seen)
        assert found == [parts for *_, parts in expected], chunks
        num_cut += max(found) > 1
    assert num_cut >= 10


def test_the_kernel_has_as_many_parts():
    assert MOST_PARTS == chunk_plan.MOST_PARTS


def by_heads(kernel, chunks):
    """The same schedule without short cuts: each head's programs, one after another."""
    cut, group, chunks = find_cut(kernel, chunks), kernel.group_size, listed(chunks)
    blocks = [(s, row) for s, (_, count) in enumerate(chunks) for row in reversed(range(0, count * group, kernel.rows))]
    seen = [(chunks[s][0] + row // group + 1) // kernel.tile for s, row in blocks]
    ends = [0.0] * kernel.multiprocessors
    for (s, row), whole, num_parts in zip(blocks, seen, parts_of_blocks(kernel, cut, seen), strict=True):
        start, count = chunks[s]
        last = -(-(start + min((row + kernel.rows - 1) // group + 1, count)) // kernel.tile)
        for part in range(num_parts):
            begin, end = (whole * each // num_parts for each in (part, part + 1))
            takes = 1.2 + end - begin + (1.1 if num_parts > 1 else 0)
            if part == num_parts - 1:
                takes += last - whole + (3 + 0.5 * num_parts if num_parts > 1 else 0)
            for _ in range(kernel.kv_heads):
                first = min(range(len(ends)), key=ends.__getitem__)
                ends[first] += takes
    return max(ends)


@pytest.mark.parametrize(("group", "heads"), SHAPES)
def test_heads_may_be_played_at_once(group, heads):
    kernel, generator = kernel_of(group, heads), random.Random(heads)
    for chunks in (draw_chunks(generator) for _ in range(10)):
        assert duration(kernel, chunks) == pytest.approx(by_heads(kernel, chunks))


def test_durations_by_hand():
    kernel = kernel_of(2, 8)
    assert duration(kernel, [(0, 64)]) == pytest.approx(1.2 + 1)
    assert duration(kernel, [(0, 64)] * 16) == pytest.approx(2.2)  # 128 programs
    assert duration(kernel, [(0, 64)] * 17) == pytest.approx(4.4)
    assert duration(kernel, [(128, 1), (0, 128)]) == pytest.approx(1.2 + 3)
    # 16 tiles in parts of 4, so that 32 of 132 multiprocessors have something to do
    assert duration(kernel, [(1023, 1)]) == pytest.approx(1.2 + 1.1 + 4 + 3 + 0.5 * 4)
