import heapq
import itertools
import random

import pytest
import torch
from gllm_kernels import chunk_plan
from gllm_kernels.chunk_attention import Tuning, chunk_attention, chunk_reference, chunk_triton, plan_chunks
from kernels.interpreter import let_scalars_bound_loops
from kernels.paged_inputs import DTYPES, GPU, TOLERANCE, draw, error, truth

let_scalars_bound_loops()
torch.set_num_threads(1)

# Two decodes, then chunks: whole prompts, chunks after what is cached, one token, tiles that end everywhere.
KV_LENS = [9, 30, 37, 16, 90, 1, 32]
QUERY_LENS = [1, 1, 37, 5, 10, 1, 16]
FIRST = 2
SMALL = Tuning(rows=16, tile=16, num_warps=4, num_stages=2, least_tiles=1 << 20)
CUT = SMALL._replace(least_tiles=1)


def tables_of(inputs):
    return inputs.query_starts, inputs.kv_lens, inputs.tables


def plan_of(inputs, tuning=None, first=FIRST):
    return plan_chunks(
        inputs.query_starts,
        inputs.kv_lens,
        torch.full((1,), first, dtype=torch.int32, device=inputs.q.device),
        max_tokens=len(inputs.q) - first,
        max_chunks=len(inputs.kv_lens) - first,
        group_size=inputs.q.shape[1] // inputs.keys.shape[2],
        num_kv_heads=inputs.keys.shape[2],
        head_dim=inputs.q.shape[2],
        dtype=inputs.q.dtype,
        tuning=tuning,
    )


def triton_of(inputs, tuning=None, first=FIRST):
    out = inputs.poisoned()
    chunk_triton(
        out, *inputs.tensors, *tables_of(inputs), plan=plan_of(inputs, tuning, first=first), scale=inputs.scale
    )
    return out


def reference_of(inputs, first=FIRST):
    out = inputs.poisoned()
    chunks = range(first, len(inputs.kv_lens))
    chunk_reference(out, *inputs.tensors, *tables_of(inputs), sequences=chunks, scale=inputs.scale)
    return out


@pytest.fixture
def by_kernel(request, monkeypatch):
    monkeypatch.setattr(chunk_plan, "runs_triton", lambda _: request.param)


@pytest.fixture
def idle_gpu(monkeypatch):
    """So many multiprocessors that a few blocks are worth cutting."""
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: 48)


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: 132)


@pytest.mark.parametrize(
    ("counts", "kv_lens", "num_decodes"),
    [
        ([7], [9], 0),
        ([1, 1, 40, 17, 1, 300], [5, 0, 44, 17, 1, 900], 2),
        ([1, 1], [3, 4], 2),
        ([3] * 70, [3] * 70, 0),
        ([1, 20, 1 << 26, 0, 0], [4, 20, 0, 0, 0], 1),  # padding has no keys, whatever its number of tokens
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("by_kernel", [True, False], indirect=True)
@pytest.mark.usefixtures("by_kernel")
def test_a_plan_lists_every_row_once(counts, kv_lens, num_decodes, group, device):
    ints = [torch.tensor(each, dtype=torch.int32, device=device) for each in (counts, kv_lens, [num_decodes])]
    starts = starts_of(ints[0])
    chunks = [(s, n) for s, (n, keys) in enumerate(zip(counts, kv_lens, strict=True)) if s >= num_decodes and keys]
    num_tokens = sum(count for _, count in chunks)
    sizes = {"max_tokens": num_tokens, "max_chunks": len(chunks) + 2, "group_size": group, "num_kv_heads": 1}
    plan = plan_chunks(starts, *ints[1:], **sizes, head_dim=16, dtype=torch.float32, tuning=SMALL)
    contexts = [keys - count for count, keys in zip(counts, kv_lens, strict=True)]
    work = [(*block, 0, 1, 0) for block in blocks_in_order(chunks, contexts, group, SMALL.rows)]
    found = [tuple(entry) for entry in plan.entries_J5.tolist()]
    assert found[: len(work)] == work
    assert all(sequence == -1 for sequence, *_ in found[len(work) :])


def blocks_in_order(chunks, contexts, group, rows):
    """Sequence and first row of each block; of a chunk, the last rows come first."""
    if chunks and contexts[chunks[-1][0]] > contexts[chunks[0][0]]:
        chunks = chunks[::-1]
    return [(s, row) for s, count in chunks for row in reversed(range(0, count * group, rows))]


def starts_of(counts):
    return torch.cat((counts[:1] * 0, counts.cumsum(0).int()))


def draw_lengths(seed, *, num_sequences=5, most_tokens=50, most_keys=1500):
    """Tokens and keys of some chunks, and padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most_tokens, (num_sequences,), generator=generator, dtype=torch.int32)
    contexts = torch.randint(most_keys, (num_sequences,), generator=generator, dtype=torch.int32)
    contexts[::2] //= 20
    kv_lens = counts + contexts
    kv_lens[-1] = 0
    return counts, kv_lens


def plans_of(
    counts, kv_lens, *, group, heads, tuning, device, num_decodes=1, head_dim=16, dtype=torch.float32, most_places=None
):
    """One by plain torch and one by the kernel."""
    starts, kv_lens = starts_of(counts).to(device), kv_lens.to(device)
    num_decodes_1 = torch.tensor([num_decodes], dtype=torch.int32, device=device)
    sizes = {"max_tokens": int(counts.sum()), "max_chunks": len(counts), "group_size": group, "num_kv_heads": heads}
    kinds = {"head_dim": head_dim, "dtype": dtype, "tuning": tuning}
    plans = [plan_chunks(starts, kv_lens, num_decodes_1, **sizes, **kinds) for _ in range(2)]
    plans = [plan._replace(counters_CK=plan.counters_CK[:most_places]) for plan in plans]
    for plan, make in zip(plans, (chunk_plan.plan_reference, chunk_plan.plan_triton), strict=True):
        for each in (plan.entries_J5, plan.counters_CK):
            each.fill_(77)
        make(plan, starts, kv_lens, num_decodes_1, group_size=group)
    return plans


@pytest.mark.parametrize("seed", [1, 2, 4])
@pytest.mark.parametrize(("group", "heads"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("tuning", [CUT, SMALL._replace(least_tiles=12)], ids=["cut", "little"])
@pytest.mark.usefixtures("idle_gpu")
def test_parts_hold_every_tile_of_a_block_once(seed, group, heads, tuning, device):
    counts, kv_lens = draw_lengths(seed)
    reference, kernel = plans_of(counts, kv_lens, group=group, heads=heads, tuning=tuning, device=device)
    assert torch.equal(reference.entries_J5, kernel.entries_J5)
    assert not kernel.counters_CK.any()
    listed = [entry for entry in kernel.entries_J5.tolist() if entry != [-1] * 5]
    assert listed == kernel.entries_J5[: len(listed)].tolist()
    wholes = [(s, row, num_parts, place) for s, row, part, num_parts, place in listed if not part]
    chunks = [(s, int(counts[s])) for s in range(1, len(counts) - 1)]
    contexts = (kv_lens - counts).tolist()
    assert [whole[:2] for whole in wholes] == blocks_in_order(chunks, contexts, group, tuning.rows)
    assert listed == [[s, row, part, n, place] for s, row, n, place in wholes for part in range(n)]
    places = [place + part for *_, part, num_parts, place in listed if num_parts > 1]
    assert places == list(range(len(places)))
    assert 0 < len(places) <= len(kernel.counters_CK)
    for s, row, num_parts, _ in wholes:
        tiles = int(kv_lens[s] - counts[s] + row // group + 1) // tuning.tile
        bounds = [tiles * part // num_parts for part in range(num_parts + 1)]
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        assert num_parts == 1 or min(lengths) >= max(1, tuning.least_tiles // 2)


@pytest.mark.usefixtures("h200")
def test_whoever_comes_last_finds_places():
    """A few tokens after many, behind a chunk whose last blocks want more parts than its mean: 22 ns a key if whole."""
    counts, kv_lens = (torch.tensor(each, dtype=torch.int32) for each in ([16, 806], [7090, 5113]))
    kinds = {"group": 2, "heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "tuning": None, "num_decodes": 0}
    plan, _ = plans_of(counts, kv_lens, **kinds, device="cpu")
    assert [entry[3] for entry in plan.entries_J5.tolist() if entry[0] == 0] == [3, 3, 3]


@pytest.mark.usefixtures("idle_gpu")
def test_blocks_without_a_place_stay_whole(device):
    """The mean block of a fresh prompt needs none, so that no table of costs says how many its last ones will want."""
    counts = torch.tensor([320], dtype=torch.int32)
    sizes = {"group": 1, "heads": 1, "tuning": CUT, "num_decodes": 0, "most_places": 7, "device": device}
    reference, kernel = plans_of(counts, counts, **sizes)
    assert torch.equal(reference.entries_J5, kernel.entries_J5)
    first_parts = kernel.entries_J5[kernel.entries_J5[:, 2] == 0]
    assert first_parts[:, 3:].tolist() == [[2, 0], [2, 2], [2, 4]] + [[1, 0]] * 17


def parts_of(counts, contexts, heads, group, device):
    """Of each block."""
    counts = torch.tensor(counts, dtype=torch.int32)
    kv_lens = counts + torch.tensor(contexts, dtype=torch.int32)
    kinds = {"head_dim": 128, "dtype": torch.bfloat16, "tuning": None, "num_decodes": 0}
    reference, kernel = plans_of(counts, kv_lens, group=group, heads=heads, device=device, **kinds)
    assert torch.equal(reference.entries_J5, kernel.entries_J5)
    return [num_parts for _, _, part, num_parts, _ in kernel.entries_J5.tolist() if part == 0]


@pytest.mark.parametrize(
    ("counts", "contexts"), [([2048], [0]), ([8192], [0]), ([512], [0]), ([512] * 4, [1536] * 4)], ids=str
)
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.usefixtures("h200")
def test_what_fills_a_gpu_is_not_cut(counts, contexts, group, device):
    assert set(parts_of(counts, contexts, 8, group, device)) == {1}


@pytest.mark.parametrize("num_tokens", [1, 64, 256])
@pytest.mark.parametrize("context", [8192, 32768])
@pytest.mark.usefixtures("h200")
def test_few_blocks_after_many_keys_fill_a_gpu(num_tokens, context, device):
    num_parts = parts_of([num_tokens], [context], 8, 4, device)
    num_waves = -(-8 * sum(num_parts) // 132)
    tiles_at_a_time = num_waves * (context / 64 / num_parts[0])
    evenly = 8 * len(num_parts) * context / 64 / 132
    assert tiles_at_a_time <= 1.05 * evenly or num_parts[0] >= 8


@pytest.mark.usefixtures("h200")
def test_a_long_block_among_many_short_ones_is_cut(device):
    num_parts = parts_of([256, 1792], [32768, 0], 8, 4, device)
    assert num_parts == [num_parts[0]] * 8 + [1] * 56
    assert num_parts[0] > 1


@pytest.mark.parametrize(
    ("counts", "contexts", "group", "most"),
    [
        ([2167], [4990], 2, 1.10),  # two waves and eight programs
        ([2167], [4990], 4, 1.05),
        ([1267], [6466], 2, 1.15),
        ([1163], [2917], 2, 1.25),
        ([2048], [4096], 2, 1.05),
        ([2048], [0], 2, 1.05),
        ([46, 1149, 822], [4033, 0, 0], 2, 1.35),
        ([46, 1149, 822], [4033, 0, 0], 4, 1.10),
        ([1149, 822, 46], [0, 0, 4033], 2, 1.35),
        ([1149, 822, 46], [0, 0, 4033], 4, 1.10),
    ],
    ids=str,
)
@pytest.mark.usefixtures("h200")
def test_programs_end_about_together(counts, contexts, group, most, device):
    """Played on 132 multiprocessors, in tiles: one to start a program, one to store a part, three to merge."""
    lengths = torch.tensor(counts, dtype=torch.int32)
    kv_lens = lengths + torch.tensor(contexts, dtype=torch.int32)
    kinds = {"heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "tuning": None, "num_decodes": 0}
    plan, by_kernel = plans_of(lengths, kv_lens, group=group, **kinds, device=device)
    assert torch.equal(plan.entries_J5, by_kernel.entries_J5)
    free, work = [0.0] * 132, 0.0
    for s, row, part, num_parts, _ in (entry for entry in plan.entries_J5.tolist() if entry[0] >= 0):
        tiles = (contexts[s] + row // group + 1) // 64
        takes = 1 + tiles * (part + 1) // num_parts - tiles * part // num_parts
        work += 8 * takes
        takes += (num_parts > 1) + (3 + num_parts / 2) * (part == num_parts - 1 > 0)
        for _ in range(8):
            heapq.heapreplace(free, free[0] + takes)
    assert max(free) <= most * work / 132


@pytest.mark.parametrize(
    "mix",
    [
        ([1328, 69], [1257, 0], 2),
        ([69, 1328], [1257, 1250], 2),
        ([1376, 1199, 303, 50], [1716, 0, 0, 1500], 4),
        ([2100, 30, 40], [3000, 20, 2500], 2),
        ([0, 60], [500, 300], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [8, 12, 132])
def test_no_part_is_empty(mix, width, device, monkeypatch):
    """Whatever is left over of whole waves: blocks with fewer tiles than others are cut less."""
    counts, contexts, group = mix
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: width)
    lengths = torch.tensor(counts, dtype=torch.int32)
    kv_lens = lengths + torch.tensor(contexts, dtype=torch.int32)
    for tuning in (None, chunk_plan.Tuning(128, 64, 8, 3, least_tiles=1)):
        kinds = {"heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "tuning": tuning, "num_decodes": 0}
        plan, by_kernel = plans_of(lengths, kv_lens, group=group, **kinds, device=device)
        assert torch.equal(plan.entries_J5, by_kernel.entries_J5)
        for s, row, _, num_parts, _ in plan.entries_J5.tolist():
            assert s < 0 or num_parts <= max(1, (contexts[s] + row // group + 1) // 64)


def draw_mixes(num, *, seed):
    """Prompts that go on, that start, and that were found in the prefix cache, in any order."""
    generator = random.Random(seed)
    for _ in range(num):
        kinds = [generator.choice((0, 0, generator.randint(1, 400))) for _ in range(generator.randint(1, 5))]
        yield [generator.randint(1, 160) for _ in kinds], kinds


def test_plans_of_any_mix_are_equal_and_have_no_empty_part(device, monkeypatch):
    num_left = 0
    for number, (counts, contexts) in enumerate(draw_mixes(100, seed=0)):
        monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _, number=number: (6, 9, 16, 48)[number % 4])
        lengths = torch.tensor(counts, dtype=torch.int32)
        kv_lens = lengths + torch.tensor(contexts, dtype=torch.int32)
        kinds = {"tuning": SMALL._replace(least_tiles=1 + number % 3), "num_decodes": 0}
        plan, by_kernel = plans_of(lengths, kv_lens, group=2, heads=2, device=device, **kinds)
        assert torch.equal(plan.entries_J5, by_kernel.entries_J5)
        entries = [entry for entry in plan.entries_J5.tolist() if entry[0] >= 0]
        parts = [entry[3] for entry in entries if entry[2] == 0]
        num_left += parts[0] == 1 < parts[-1]
        for s, row, _, num_parts, _ in entries:
            assert num_parts <= max(1, (contexts[s] + row // 2 + 1) // SMALL.tile)
    assert num_left, "no mix had left-over blocks that are cut alone"


@pytest.mark.parametrize(("kv_lens", "query_lens"), [([149, 286], [149, 3]), ([286, 149], [3, 149]), ([330], [34])])
@pytest.mark.parametrize("width", [8, 9, 12])
def test_left_over_blocks_equal_float64(kv_lens, query_lens, width, device, monkeypatch):
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: width)
    shape = {"page": 4, "heads": 2, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    inputs = draw(kv_lens, query_lens, **shape)
    tuning = Tuning(16, 16, 4, 2, least_tiles=4)
    assert error(triton_of(inputs, tuning, first=0), truth(inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("precision", [(DTYPES[0], Tuning(32, 32, 4, 2)), (DTYPES[1], None)], ids=str)
@pytest.mark.parametrize(
    ("page", "group", "width"), [(1, 1, 16), (4, 7, 80), (16, 2, 128), (64, 8, 64), (16, 4, 128), (3, 3, 24)]
)
def test_equals_float64(page, group, width, precision, device):
    dtype, tuning = precision
    inputs = draw(KV_LENS, QUERY_LENS, page=page, heads=2, group=group, width=width, dtype=dtype, device=device)
    expected = truth(inputs)[FIRST:]
    assert error(reference_of(inputs)[FIRST:], expected) < TOLERANCE[dtype]
    out = triton_of(inputs, tuning)
    assert error(out[FIRST:], expected) < TOLERANCE[dtype]
    assert out[:FIRST].isnan().all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_chunks(seed, device):
    generator = torch.Generator().manual_seed(seed)
    query_lens = torch.randint(1, 50, (5,), generator=generator)
    kv_lens = query_lens + torch.randint(60, (5,), generator=generator)
    shape = {"page": 4, "heads": 1, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    inputs = draw(kv_lens.tolist(), query_lens.tolist(), seed=seed, **shape)
    assert error(triton_of(inputs, SMALL, first=0), truth(inputs)) < TOLERANCE[torch.float32]


def test_tiles_end_around_what_the_first_query_sees(device):
    contexts = range(SMALL.tile - 3, SMALL.tile + 3)
    shape = {"page": 4, "heads": 1, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    inputs = draw([context + 9 for context in contexts], [9] * len(contexts), **shape)
    assert error(triton_of(inputs, SMALL, first=0), truth(inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("precision", [(DTYPES[0], CUT), (DTYPES[1], CUT._replace(rows=32, num_stages=1))], ids=str)
@pytest.mark.parametrize(("page", "group", "width"), [(1, 1, 16), (4, 7, 80), (16, 2, 128), (3, 3, 24)])
@pytest.mark.usefixtures("idle_gpu")
def test_cut_blocks_equal_float64(page, group, width, precision, device):
    dtype, tuning = precision
    shape = {"page": page, "heads": 2, "group": group, "width": width, "dtype": dtype, "device": device}
    inputs = draw([9, 30, 150, 280, 21], [1, 1, 2, 5, 9], **shape)
    assert (plan_of(inputs, tuning).entries_J5[:, 3] > 2).any()
    out = triton_of(inputs, tuning)
    assert error(out[FIRST:], truth(inputs)[FIRST:]) < TOLERANCE[dtype]
    assert out[:FIRST].isnan().all()


@pytest.mark.usefixtures("idle_gpu")
def test_layers_share_a_plan(device):
    shape = {"page": 4, "heads": 2, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    kv_lens, query_lens = [200, 60, 260, 9], [5, 12, 2, 9]
    layers = [draw(kv_lens, query_lens, **shape) for _ in range(2)]
    layers[1].q, layers[1].values = layers[1].q.flip(0).contiguous(), layers[1].values.flip(-1).contiguous()
    plan = plan_of(layers[0], CUT, first=0)
    assert (plan.entries_J5[:, 3] > 1).any()
    for inputs in (*layers, layers[0]):
        out = inputs.poisoned()
        chunk_triton(out, *inputs.tensors, *tables_of(inputs), plan=plan, scale=inputs.scale)
        assert error(out, truth(inputs)) < TOLERANCE[torch.float32]
        assert not plan.counters_CK.any()
        plan.scratch.fill_(float("nan"))


@pytest.mark.usefixtures("idle_gpu")
def test_parts_are_merged_in_their_order_whoever_comes_last(device):
    """Programs run one by one here: those of a list turned around come in the opposite order."""
    shape = {"page": 4, "heads": 2, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    inputs = draw([400, 90], [5, 30], **shape)
    plan = plan_of(inputs, CUT, first=0)
    turned = plan._replace(entries_J5=plan.entries_J5.flip(0).contiguous())
    outs = [inputs.poisoned() for _ in range(2)]
    for out, each in zip(outs, (plan, turned), strict=True):
        chunk_triton(out, *inputs.tensors, *tables_of(inputs), plan=each, scale=inputs.scale)
    assert torch.equal(*outs)


def test_what_cannot_be_planned_is_refused(device):
    starts, lens, one = (torch.zeros(size, dtype=torch.int32, device=device) for size in (4, 3, 1))
    sizes = {
        "max_tokens": 3,
        "max_chunks": 3,
        "group_size": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match="int32"):
        plan_chunks(starts.long(), lens, one, **sizes)
    with pytest.raises(ValueError, match="one start more"):
        plan_chunks(starts, starts, one, **sizes)


def test_what_does_not_fit_is_refused(device):
    inputs = draw([20, 5], [7, 5], page=4, heads=2, group=2, width=16, dtype=torch.float32, device=device)
    q, keys, values = inputs.tensors

    def refused(message, *tensors, **changes):
        settings = {
            "query_starts": inputs.query_starts,
            "kv_lens_S": inputs.kv_lens,
            "block_tables_SB": inputs.tables,
            "plan": plan_of(inputs, first=0),
            "scale": 1.0,
            "out_THE": torch.empty_like(q),
        }
        with pytest.raises(ValueError, match=message):
            chunk_attention(*tensors, **settings | changes)

    refused("do not fit", q, keys[:-1], values)
    refused("one type", q.half(), keys, values)
    refused("one type", q, keys, values, out_THE=q[:3])
    refused("contiguous", q, keys.transpose(1, 2).contiguous().transpose(1, 2), values)
    refused("int32", q, keys, values, kv_lens_S=inputs.kv_lens.long())
    refused("one start more", q, keys, values, query_starts=inputs.query_starts[:2])
    refused("positive", q, keys, values, scale=0.0)
    other = draw([20, 5], [7, 5], page=4, heads=1, group=2, width=16, dtype=torch.float32, device=device)
    refused("the plan is of other heads", q, keys, values, plan=plan_of(other, first=0))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("heads", "group"), [(8, 2), (8, 4), (8, 8), (4, 8)])
@pytest.mark.parametrize(
    ("kv_lens", "query_lens"),
    [
        ([2048] * 2, [2048] * 2),
        ([4000], [1000]),
        ([900, 77, 500, 2000], [900, 77, 1, 130]),
        ([8256], [64]),
        ([20000, 1000], [1, 1000]),
    ],
)
def test_real_sizes(kv_lens, query_lens, heads, group, device):
    shape = {"page": 16, "heads": heads, "group": group, "width": 128, "dtype": torch.bfloat16, "device": device}
    inputs = draw(kv_lens, query_lens, **shape)
    expected = reference_of(inputs, first=0).double()
    for tuning in (None, Tuning(128, 128, 8, 2), Tuning(128, 128, 8, 3), Tuning(64, 64, 4, 3)):
        assert error(triton_of(inputs, tuning, first=0), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_graph_cuts_as_its_lengths_say(device):
    """Layers share a plan that each replay makes anew; whoever comes last, the bits are the same."""
    shape = {"page": 16, "heads": 8, "group": 4, "width": 128, "dtype": torch.bfloat16, "device": device}
    inputs = draw([33000, 100], [200, 100], **shape)
    out = inputs.poisoned()

    def step():
        plan = plan_of(inputs, first=0)
        for _ in range(3):
            chunk_triton(out, *inputs.tensors, *tables_of(inputs), plan=plan, scale=inputs.scale)
        return plan

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = step()
    for kv_lens, is_cut in (([33000, 100], True), ([200, 100], False), ([9000, 100], True)):
        inputs.kv_lens.copy_(torch.tensor(kv_lens))
        outs = []
        for _ in range(20):
            out.fill_(float("nan"))
            graph.replay()
            outs.append(out.clone())
        assert bool((plan.entries_J5[:, 3] > 1).any()) == is_cut
        assert not plan.counters_CK.any()
        assert error(outs[0], reference_of(inputs, first=0).double()) < 1e-2
        assert all(torch.equal(outs[0], each) for each in outs)
