import pytest
import torch
from gllm_kernels.chunk_attention import Tuning, chunk_attention, chunk_reference, chunk_triton
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


def triton_of(inputs, tuning=None, first=FIRST):
    out = inputs.poisoned()
    longest = max(inputs.query_lens)
    chunk_triton(
        out,
        *inputs.tensors,
        *tables_of(inputs),
        first_chunk=first,
        max_query_len=longest,
        scale=inputs.scale,
        tuning=tuning,
    )
    return out


def reference_of(inputs, first=FIRST):
    out = inputs.poisoned()
    chunk_reference(out, *inputs.tensors, *tables_of(inputs), first_chunk=first, scale=inputs.scale)
    return out


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


def test_what_does_not_fit_is_refused(device):
    inputs = draw([20, 5], [7, 5], page=4, heads=2, group=2, width=16, dtype=torch.float32, device=device)
    q, keys, values = inputs.tensors

    def refused(message, *tensors, **changes):
        settings = {
            "query_starts": inputs.query_starts,
            "kv_lens_S": inputs.kv_lens,
            "block_tables_SB": inputs.tables,
            "first_chunk": 0,
            "max_query_len": 7,
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
