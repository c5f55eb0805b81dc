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
SMALL = Tuning(rows=16, tile=16, num_warps=4, num_stages=2)


def tables_of(inputs):
    return inputs.query_starts, inputs.kv_lens, inputs.tables


def plan_of(inputs, tuning=None, first=FIRST):
    return plan_chunks(
        inputs.query_starts,
        inputs.kv_lens,
        torch.tensor([first], dtype=torch.int32, device=inputs.q.device),
        max_tokens=len(inputs.q) - first,
        max_chunks=len(inputs.kv_lens) - first,
        group_size=inputs.q.shape[1] // inputs.keys.shape[2],
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
    starts = torch.cat((ints[0][:1] * 0, ints[0].cumsum(0).int()))
    chunks = [(s, n) for s, (n, keys) in enumerate(zip(counts, kv_lens, strict=True)) if s >= num_decodes and keys]
    num_tokens = sum(count for _, count in chunks)
    sizes = {"max_tokens": num_tokens, "max_chunks": len(chunks) + 2, "group_size": group}
    plan = plan_chunks(starts, *ints[1:], **sizes, head_dim=16, dtype=torch.float32, tuning=SMALL)
    work = [(s, row) for s, count in chunks for row in range(0, count * group, SMALL.rows)]
    found = [tuple(entry) for entry in plan.entries_J2.tolist()]
    assert found[: len(work)] == work[::-1]
    assert all(sequence == -1 for sequence, _ in found[len(work) :])


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


def test_what_cannot_be_planned_is_refused(device):
    starts, lens, one = (torch.zeros(size, dtype=torch.int32, device=device) for size in (4, 3, 1))
    sizes = {"max_tokens": 3, "max_chunks": 3, "group_size": 2, "head_dim": 16, "dtype": torch.float32}
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


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("heads", "group"), [(8, 2), (8, 4), (8, 8), (4, 8)])
@pytest.mark.parametrize(
    ("kv_lens", "query_lens"),
    [([2048] * 2, [2048] * 2), ([4000], [1000]), ([900, 77, 500, 2000], [900, 77, 1, 130])],
)
def test_real_sizes(kv_lens, query_lens, heads, group, device):
    shape = {"page": 16, "heads": heads, "group": group, "width": 128, "dtype": torch.bfloat16, "device": device}
    inputs = draw(kv_lens, query_lens, **shape)
    expected = reference_of(inputs, first=0).double()
    for tuning in (None, Tuning(128, 128, 8, 2), Tuning(128, 128, 8, 3), Tuning(64, 64, 4, 3)):
        assert error(triton_of(inputs, tuning, first=0), expected) < 1e-2
