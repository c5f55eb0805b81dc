import math

import pytest
import torch
from gllm_kernels.decode_attention import decode_attention, decode_reference, decode_triton
from gllm_kernels.decode_plan import Tuning, _empty_plan, default_tuning, plan_decode, plan_reference, plan_triton
from kernels.interpreter import let_scalars_bound_loops
from kernels.paged_inputs import DTYPES, GPU, TOLERANCE, draw, error, truth

let_scalars_bound_loops()
torch.set_num_threads(1)

LENGTHS = [0, 1, 37, 16, 200, 0, 33]
ONE_WORKER, SOME, MANY = Tuning(16, 4, 2, 1), Tuning(32, 4, 2, 6), Tuning(16, 4, 3, 16)


def plan_of(inputs, tuning, make=plan_triton, num_decodes=None):
    plan = _empty_plan(
        inputs.kv_lens, inputs.q.shape[1], inputs.keys.shape[2], inputs.q.shape[2], inputs.q.dtype, tuning
    )
    for each in plan[:5]:
        each.fill_(-77)
    plan.scratch.fill_(float("nan"))
    num_decodes = len(inputs.kv_lens) if num_decodes is None else num_decodes
    make(plan, inputs.kv_lens, torch.tensor([num_decodes], dtype=torch.int32, device=inputs.q.device))
    return plan


def triton_of(inputs, plan):
    out = inputs.poisoned()
    decode_triton(out, *inputs.tensors, inputs.kv_lens, inputs.tables, plan=plan, scale=inputs.scale)
    return out


def reference_of(inputs):
    out = inputs.poisoned()
    decode_reference(out, *inputs.tensors, inputs.kv_lens, inputs.tables, scale=inputs.scale)
    return out


def decodes(lengths, *, seed=0, **shape):
    return draw(lengths, [1] * len(lengths), seed=seed, **shape)


@pytest.mark.parametrize(
    "lengths", [[0], [1], LENGTHS, [0] * 5, [5000], list(range(70)), [64, 128, 64], [3] * 600], ids=len
)
@pytest.mark.parametrize("tuning", [ONE_WORKER, SOME, MANY])
def test_a_plan_gives_every_tile_to_one_worker(lengths, tuning, device):
    inputs = decodes(lengths, page=16, heads=2, group=1, width=16, dtype=torch.float32, device=device)
    plan, expected = plan_of(inputs, tuning), plan_of(inputs, tuning, plan_reference)
    for mine, other in zip(plan[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    tiles = [max(1, math.ceil(length / tuning.tile)) for length in lengths]
    owners = [sequence for sequence, count in enumerate(tiles) for _ in range(count)]
    quota = max(math.ceil(len(owners) / len(plan.spans_W2)), int(math.sqrt(max(tiles)) / 2))
    assert plan.quota.item() == quota
    assert plan.bounds_S.tolist() == [sum(tiles[:index]) for index in range(len(tiles) + 1)]
    assert not plan.counters_SK.any()
    for worker, (first, last) in enumerate(plan.spans_W2.tolist()):
        mine = owners[worker * quota : (worker + 1) * quota]
        assert (first, last) == (mine[0], mine[-1]) if mine else last < first


@pytest.mark.parametrize("num_decodes", [0, 2, 4, len(LENGTHS)])
@pytest.mark.parametrize("tuning", [ONE_WORKER, SOME, MANY])
def test_a_plan_leaves_those_that_do_not_decode_alone(num_decodes, tuning, device):
    inputs = decodes(LENGTHS, page=16, heads=2, group=1, width=16, dtype=torch.float32, device=device)
    plan = plan_of(inputs, tuning, num_decodes=num_decodes)
    expected = plan_of(inputs, tuning, plan_reference, num_decodes=num_decodes)
    for mine, other in zip(plan[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    out = triton_of(inputs, plan)
    assert out[num_decodes:].isnan().all()
    if num_decodes:
        assert error(out[:num_decodes], truth(inputs)[:num_decodes]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("page", "group", "width"), [(1, 1, 16), (4, 7, 80), (16, 2, 128), (64, 8, 64), (16, 4, 128), (3, 3, 24)]
)
def test_equals_float64(page, group, width, dtype, device):
    inputs = decodes(LENGTHS, page=page, heads=2, group=group, width=width, dtype=dtype, device=device)
    expected = truth(inputs)
    assert error(reference_of(inputs), expected) < TOLERANCE[dtype]
    for tuning in (MANY, default_tuning(group, width, dtype)):
        out = triton_of(inputs, plan_of(inputs, tuning))
        assert error(out, expected) < TOLERANCE[dtype]
        assert not out[inputs.kv_lens == 0].any()  # and NaN nowhere


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_layers_share_a_plan(seed, device):
    """Counters are back at zero after each call, and what was left in the scratch does not matter."""
    shape = {"page": 4, "heads": 3, "group": 2, "width": 16, "dtype": torch.float32, "device": device}
    lengths = torch.randint(150, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    plan = None
    for layer in range(2):
        inputs = decodes(lengths, seed=10 * seed + layer, **shape)
        plan = plan or plan_of(inputs, SOME)
        assert error(triton_of(inputs, plan), truth(inputs)) < TOLERANCE[torch.float32]
        assert not plan.counters_SK.any()


def test_every_worker_of_a_long_sequence_adds_its_part(device):
    """More parts, and more members of the group, than are merged at a time."""
    inputs = decodes([1000, 3], page=16, heads=1, group=7, width=16, dtype=torch.float32, device=device)
    plan = plan_of(inputs, Tuning(tile=16, num_warps=4, num_stages=2, programs_per_multiprocessor=10))
    assert (plan.spans_W2[:, 1] == 0).sum() > 8
    assert error(triton_of(inputs, plan), truth(inputs)) < TOLERANCE[torch.float32]


def test_the_operation_writes_rows_of_a_larger_tensor(device):
    inputs = decodes([20, 5], page=4, heads=2, group=2, width=16, dtype=torch.float32, device=device)
    plan = plan_decode(inputs.kv_lens, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    out = torch.full((5, 4, 16), 7.0, device=device)
    tables = {"kv_lens_S": inputs.kv_lens, "block_tables_SB": inputs.tables, "plan": plan, "scale": inputs.scale}
    decode_attention(*inputs.tensors, **tables, out_SHE=out[:2])
    assert error(out[:2], truth(inputs)) < TOLERANCE[torch.float32]
    assert (out[2:] == 7).all()
    assert torch.equal(decode_attention(*inputs.tensors, **tables), out[:2])


def test_what_does_not_fit_is_refused(device):
    inputs = decodes([20, 5], page=4, heads=2, group=2, width=16, dtype=torch.float32, device=device)
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    plan = plan_decode(inputs.kv_lens, **heads)
    q, keys, values = inputs.tensors

    def refused(message, *tensors, **changes):
        tables = {"kv_lens_S": inputs.kv_lens, "block_tables_SB": inputs.tables, "plan": plan, "scale": 1.0} | changes
        with pytest.raises(ValueError, match=message):
            decode_attention(*tensors, **tables)

    refused("do not fit", q, keys, values[:-1])
    refused("do not fit", q[:, :3], keys, values)
    refused("differ", q.half(), keys, values)
    refused("contiguous", q.transpose(0, 1).contiguous().transpose(0, 1), keys, values)
    refused("int32", q, keys, values, kv_lens_S=inputs.kv_lens.long())
    refused("block tables", q, keys, values, block_tables_SB=inputs.tables[:1])
    refused("other heads", q, keys, values, plan=plan_decode(inputs.kv_lens, **heads | {"head_dim": 32}))
    refused("output", q, keys, values, out_SHE=q.half())
    with pytest.raises(ValueError, match="int32"):
        plan_decode(inputs.kv_lens[:0], **heads)
    with pytest.raises(ValueError, match="evenly"):
        plan_decode(inputs.kv_lens, **heads | {"num_kv_heads": 3})


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("heads", "group"), [(8, 2), (8, 4), (8, 8), (4, 8), (1, 8)])
@pytest.mark.parametrize("lengths", [[1150] * 64, [8192] * 8, [1000], list(range(100, 2048, 8))], ids=len)
def test_real_sizes(lengths, heads, group, device):
    inputs = decodes(lengths, page=16, heads=heads, group=group, width=128, dtype=torch.bfloat16, device=device)
    expected = reference_of(inputs).double()
    default = default_tuning(group, 128, torch.bfloat16)
    for tuning in (default, Tuning(32, 4, 4, 4), Tuning(64, 8, 3, 3), Tuning(32, 2, 4, 4)):
        plan = plan_of(inputs, tuning)
        for _ in range(3):
            assert error(triton_of(inputs, plan), expected) < 1e-2
        assert not plan.counters_SK.any()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_graph_follows_its_lengths(device):
    inputs = decodes([700, 900, 30, 1], page=16, heads=8, group=4, width=128, dtype=torch.bfloat16, device=device)
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    out = inputs.poisoned()

    def step():
        plan = plan_decode(inputs.kv_lens, **heads)
        for _ in range(2):
            decode_triton(out, *inputs.tensors, inputs.kv_lens, inputs.tables, plan=plan, scale=inputs.scale)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([700, 900, 30, 1], [1, 0, 29, 0], [64, 899, 0, 1]):
        inputs.kv_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert error(out, truth(inputs)) < 1e-2
