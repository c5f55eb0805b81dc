import pytest
import torch
from gllm_kernels import chunk_attention, chunk_plan, decode_attention, decode_plan
from gllm_kernels.chunk_plan import plan_chunks
from gllm_kernels.decode_plan import plan_decode
from gllm_kernels.flash_attention import what_flash_lacks
from gllm_kernels.paged_attention import choose_backend, paged_attention
from kernels.interpreter import let_scalars_bound_loops
from kernels.paged_inputs import DTYPES, GPU, TOLERANCE, draw, error, truth

let_scalars_bound_loops()
torch.set_num_threads(1)

MIXED = ([9, 0, 70, 37, 16, 90], [1, 1, 1, 37, 5, 20], 3)
DECODES = ([9, 0, 70], [1, 1, 1], 3)
CHUNKS = ([37, 16, 90], [37, 5, 20], 0)
BATCHES = pytest.mark.parametrize("batch", [MIXED, DECODES, CHUNKS], ids=["mixed", "decodes", "chunks"])


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """The kernels themselves where there is no GPU, too."""
    for module in (decode_attention, decode_plan, chunk_attention, chunk_plan):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)


def attend(inputs, num_decodes, backend, *, with_plan):
    heads = {"num_heads": inputs.q.shape[1], "num_kv_heads": inputs.keys.shape[2], "head_dim": inputs.q.shape[2]}
    plan = None
    if with_plan and num_decodes:
        plan = plan_decode(inputs.kv_lens[:num_decodes], dtype=inputs.q.dtype, **heads)
    return paged_attention(
        *inputs.tensors,
        query_starts=inputs.query_starts,
        kv_lens_S=inputs.kv_lens,
        block_tables_SB=inputs.tables,
        num_decodes=num_decodes,
        max_query_len=max(inputs.query_lens),
        max_kv_len=int(inputs.kv_lens.max()),
        scale=inputs.scale,
        decode_plan=plan,
        backend=backend,
    )


@BATCHES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels_everywhere")
def test_backends_agree(batch, dtype, device):
    kv_lens, query_lens, num_decodes = batch
    inputs = draw(kv_lens, query_lens, page=16, heads=2, group=2, width=64, dtype=dtype, device=device)
    expected = truth(inputs)
    for backend, with_plan in (("torch", False), ("triton", True), ("triton", False)):
        out = attend(inputs, num_decodes, backend, with_plan=with_plan)
        assert error(out, expected) < TOLERANCE[dtype]


@BATCHES
@pytest.mark.usefixtures("kernels_everywhere")
def test_only_the_device_needs_to_know_who_decodes(batch, device):
    """As in a graph: the host has bounds, and rows of padding follow."""
    kv_lens, query_lens, num_decodes = batch
    inputs = draw(kv_lens, query_lens, page=16, heads=2, group=2, width=64, dtype=torch.float32, device=device)
    most = len(kv_lens)
    padded_lens = torch.cat((inputs.kv_lens, inputs.kv_lens.new_zeros(1)))
    starts = torch.cat((inputs.query_starts, inputs.query_starts.new_full((1,), 1 << 30)))
    one = torch.tensor([num_decodes], dtype=torch.int32, device=device)
    heads, kinds = {"num_kv_heads": 2, "group_size": 2}, {"head_dim": 64, "dtype": torch.float32}
    q = torch.cat((inputs.q, torch.full_like(inputs.q[:9], float("nan"))))
    out = paged_attention(
        q,
        *inputs.tensors[1:],
        query_starts=starts,
        kv_lens_S=padded_lens,
        block_tables_SB=torch.cat((inputs.tables, inputs.tables[:1])),
        num_decodes=most,
        max_query_len=len(q),
        max_kv_len=1000,
        scale=inputs.scale,
        decode_plan=plan_decode(padded_lens[:most], num_heads=4, num_kv_heads=2, num_decodes_1=one, **kinds),
        chunk_plan=plan_chunks(starts, padded_lens, one, max_tokens=len(q), max_chunks=most, **heads, **kinds),
        backend="triton",
    )
    assert error(out[: len(inputs.q)], truth(inputs)) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("kernels_everywhere")
def test_layers_share_plans_with_cut_chunks(monkeypatch, device):
    monkeypatch.setattr(chunk_plan, "num_multiprocessors", lambda _: 132)
    kinds = {"head_dim": 64, "dtype": torch.float32}
    inputs = draw(
        [9, 70, 600, 37], [1, 1, 20, 5], page=16, heads=2, group=2, width=64, device=device, dtype=torch.float32
    )
    two = torch.tensor([2], dtype=torch.int32, device=device)
    sizes = {"max_tokens": len(inputs.q), "max_chunks": 4, "num_kv_heads": 2, "group_size": 2}
    cut = plan_chunks(inputs.query_starts, inputs.kv_lens, two, **sizes, **kinds)
    assert (cut.entries_J5[:, 3] > 1).any()
    settings = {"num_decodes": 3, "max_query_len": 20, "max_kv_len": 600, "scale": inputs.scale, "backend": "triton"}
    tables = {"query_starts": inputs.query_starts, "kv_lens_S": inputs.kv_lens, "block_tables_SB": inputs.tables}
    plans = {
        "decode_plan": plan_decode(inputs.kv_lens[:3], num_heads=4, num_kv_heads=2, num_decodes_1=two, **kinds),
        "chunk_plan": cut,
    }
    for _ in range(2):
        out = paged_attention(*inputs.tensors, **tables, **settings, **plans)
        assert error(out, truth(inputs)) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@BATCHES
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("with_plan", [True, False])
def test_flash_agrees(batch, width, page, with_plan, device):
    lacks = what_flash_lacks(device=device, dtype=torch.bfloat16, head_dim=width, block_size=page)
    if lacks:
        pytest.skip(f"needs {lacks}")
    kv_lens, query_lens, num_decodes = batch
    shape = {"page": page, "heads": 2, "group": 4, "width": width, "dtype": torch.bfloat16, "device": device}
    inputs = draw(kv_lens, query_lens, **shape)
    expected = truth(inputs)
    for each in (inputs.keys, inputs.values):
        each.nan_to_num_()  # it may read whole blocks, which the engine zeroes at first
    out = attend(inputs, num_decodes, "flash", with_plan=with_plan)
    has_keys = torch.repeat_interleave(inputs.kv_lens > 0, torch.tensor(inputs.query_lens, device=device))
    assert error(out[has_keys], expected[has_keys]) < TOLERANCE[torch.bfloat16]


def test_an_unknown_backend_is_refused(device):
    inputs = draw([3], [1], page=4, heads=1, group=1, width=16, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="no attention backend flush"):
        attend(inputs, 1, "flush", with_plan=False)


CPU = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "head_dim": 128, "block_size": 16}


def test_a_cpu_has_the_references():
    assert choose_backend("auto", **CPU) == "torch"
    assert choose_backend("torch", **CPU) == "torch"
    for wanted in ("triton", "flash"):
        with pytest.raises(ValueError, match=f"--attention-backend {wanted} needs an NVIDIA GPU"):
            choose_backend(wanted, **CPU)
    with pytest.raises(ValueError, match="not fast"):
        choose_backend("fast", **CPU)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"dtype": torch.float32}, "bfloat16 or float16, not float32"),
        ({"head_dim": 80}, "heads of 64, 96, 128 dimensions, not 80"),
        ({"block_size": 4}, "multiple of 16 tokens, not 4"),
        ({}, "the package flash-attn-4"),
    ],
)
def test_what_flash_cannot_serve_is_said(change, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    cache = CPU | {"device": torch.device("cuda")} | change
    with pytest.raises(ValueError, match=f"--attention-backend flash needs .*{lacks}"):
        choose_backend("flash", **cache)
    assert choose_backend("auto", **cache) == "triton"
    assert choose_backend("triton", **cache) == "triton"


def test_an_older_gpu_has_no_flash(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU of compute capability 9"):
        choose_backend("flash", **CPU | {"device": torch.device("cuda")})


@pytest.mark.skipif(GPU, reason="says what happens without one")
def test_the_kernels_fall_back_on_a_cpu(device):
    kv_lens, query_lens, num_decodes = MIXED
    inputs = draw(kv_lens, query_lens, page=4, heads=2, group=2, width=16, dtype=torch.float32, device=device)
    out = attend(inputs, num_decodes, "triton", with_plan=True)
    assert error(out, truth(inputs)) < TOLERANCE[torch.float32]
