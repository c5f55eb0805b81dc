"""Norm, rotation and cache write in one kernel, against plain torch in float64 and against the definition."""

# ruff: noqa: N806 - tensors carry their shape in their name

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from gllm_kernels.qkv import (
    FEW_TOKENS,
    norm_rotate_cache,
    norm_rotate_cache_reference,
    norm_rotate_cache_triton,
)

torch.set_num_threads(1)

EPS = 1e-6


class Layout(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pairs: int
    interleaved: bool
    normed: bool


LAYOUTS = {
    "qwen3": Layout(4, 2, 16, 8, interleaved=False, normed=True),
    "qwen3-head-128": Layout(16, 8, 128, 64, interleaved=False, normed=True),
    "llama": Layout(6, 2, 80, 40, interleaved=False, normed=False),
    "one kv head": Layout(7, 1, 64, 32, interleaved=False, normed=True),
    "glm": Layout(4, 2, 128, 32, interleaved=True, normed=False),
    "glm, normed": Layout(5, 2, 24, 6, interleaved=True, normed=True),
    "odd sizes": Layout(3, 3, 21, 5, interleaved=False, normed=True),
    "odd sizes, interleaved": Layout(3, 1, 13, 3, interleaved=True, normed=True),
    "all pairs interleaved": Layout(2, 1, 32, 16, interleaved=True, normed=False),
}


class Inputs(NamedTuple):
    qkv: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


def draw(layout, num_tokens, dtype, device, *, block_size=4, num_padding=0, cache_dtype=None):
    def random(*size, dtype=dtype):
        return torch.randn(size, device=device).to(dtype)

    num_blocks = 2 * num_tokens // block_size + 2
    angles = 10 * torch.randn(num_tokens, layout.num_pairs)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[torch.randperm(num_tokens)[:num_padding]] = -1
    cache_size = num_blocks, block_size, layout.num_kv_heads, layout.head_dim
    return Inputs(
        qkv=random(num_tokens, (layout.num_heads + 2 * layout.num_kv_heads) * layout.head_dim),
        q_weight=random(layout.head_dim) if layout.normed else None,
        k_weight=random(layout.head_dim) if layout.normed else None,
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        keys=random(*cache_size, dtype=cache_dtype or dtype),
        values=random(*cache_size, dtype=cache_dtype or dtype),
        slots=slots.to(device),
    )


def run(function, layout, inputs, **options):
    """The queries and what became of the caches; the inputs stay."""
    copy = inputs._replace(keys=inputs.keys.clone(), values=inputs.values.clone())
    q = function(*copy, eps=EPS, interleaved=layout.interleaved, **options)
    return q, copy.keys, copy.values


def truth(layout, inputs):
    """In float64, token by token and pair by pair."""
    num_tokens, E = len(inputs.qkv), layout.head_dim
    heads = inputs.qkv.double().cpu().view(num_tokens, -1, E).clone()
    k_end = layout.num_heads + layout.num_kv_heads
    if layout.normed:
        heads[:, :k_end] /= (heads[:, :k_end].square().mean(-1, keepdim=True) + EPS).sqrt()
        heads[:, : layout.num_heads] *= inputs.q_weight.double().cpu()
        heads[:, layout.num_heads : k_end] *= inputs.k_weight.double().cpu()
    turned = heads.clone()
    for pair in range(layout.num_pairs):
        one, two = (2 * pair, 2 * pair + 1) if layout.interleaved else (pair, pair + layout.num_pairs)
        cos, sin = (each[:, pair, None].double().cpu() for each in (inputs.cos, inputs.sin))
        x, y = heads[:, :k_end, one], heads[:, :k_end, two]
        turned[:, :k_end, one], turned[:, :k_end, two] = x * cos - y * sin, y * cos + x * sin
    keys, values = inputs.keys.double().cpu().clone(), inputs.values.double().cpu().clone()
    for token, slot in enumerate(inputs.slots.tolist()):
        if slot >= 0:
            place = divmod(slot, keys.shape[1])
            keys[place] = turned[token, layout.num_heads : k_end]
            values[place] = heads[token, k_end:]
    return turned[:, : layout.num_heads], keys, values


def relative_error(out, expected):
    return ((out.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()).item()


def tolerance(dtype, device):
    # The interpreter cuts float32 to bfloat16 where a GPU rounds it.
    return {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2 if device.type == "cuda" else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernel_does_what_is_defined(name, dtype, device):
    torch.manual_seed(len(name))
    layout = LAYOUTS[name]
    inputs = draw(layout, 5, dtype, device, num_padding=2)
    for out, expected in zip(run(norm_rotate_cache_triton, layout, inputs), truth(layout, inputs), strict=True):
        assert relative_error(out, expected) < tolerance(dtype, device)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_does_what_is_defined(name):
    torch.manual_seed(len(name) + 1)
    layout = LAYOUTS[name]
    for num_padding in (0, 3, 6):
        inputs = draw(layout, 6, torch.float32, torch.device("cpu"), num_padding=num_padding)
        for out, expected in zip(run(norm_rotate_cache_reference, layout, inputs), truth(layout, inputs), strict=True):
            assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("function", [norm_rotate_cache_triton, norm_rotate_cache_reference])
@pytest.mark.parametrize("num_padding", [1, 3])
def test_padding_writes_nothing_and_stays_finite(function, num_padding, device):
    """Not into slot 0 either, which may be a neighbour's; what other slots hold stays, to the bit."""
    torch.manual_seed(num_padding)
    layout = LAYOUTS["qwen3"]
    inputs = draw(layout, 3, torch.float32, device, num_padding=num_padding)
    inputs.slots[inputs.slots >= 0] = torch.arange(3 - num_padding, device=device)
    inputs.keys[-1, -1] = float("nan")  # the place that -1 is, counted from the end
    inputs.values[-1, -1] = float("nan")
    q, keys, values = run(function, layout, inputs)
    assert q.isfinite().all()
    written = torch.zeros(len(keys) * 4, dtype=torch.bool, device=device)
    written[: 3 - num_padding] = True
    for before, after in ((inputs.keys, keys), (inputs.values, values)):
        flat_before, flat_after = before.flatten(0, 1), after.flatten(0, 1)
        assert torch.equal(flat_before[~written].isnan(), flat_after[~written].isnan())
        assert torch.equal(flat_before[~written].nan_to_num(), flat_after[~written].nan_to_num())
        assert (flat_before[written] != flat_after[written]).all()


@pytest.mark.parametrize("settings", [(1, 8), (2, 16), (16, 16), (32, 8)])
def test_any_heads_per_program_give_the_same(settings, device):
    torch.manual_seed(7)
    layout = LAYOUTS["qwen3"]
    inputs = draw(layout, 3, torch.float32, device)
    heads, elements = settings
    outs = run(norm_rotate_cache_triton, layout, inputs, heads_per_program=heads, elements_per_thread=elements)
    for out, expected in zip(outs, truth(layout, inputs), strict=True):
        assert relative_error(out, expected) < 1e-5


def test_cache_of_another_type_is_cast_to(device):
    torch.manual_seed(8)
    layout = LAYOUTS["qwen3"]
    inputs = draw(layout, 3, torch.float32, device, cache_dtype=torch.float16)
    _, keys, values = run(norm_rotate_cache_triton, layout, inputs)
    _, expected_keys, expected_values = truth(layout, inputs)
    assert keys.dtype == torch.float16
    assert relative_error(keys, expected_keys) < 1e-3
    assert relative_error(values, expected_values) < 1e-3


def test_half_precision_is_rounded_where_plain_torch_rounds(device):
    torch.manual_seed(9)
    layout = LAYOUTS["qwen3-head-128"]
    inputs = draw(layout, 2, torch.float16, device)
    outs, expected = run(norm_rotate_cache_triton, layout, inputs), run(norm_rotate_cache_reference, layout, inputs)
    for out, wanted in zip(outs, expected, strict=True):
        assert (out == wanted).float().mean() > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes for a GPU")
@pytest.mark.parametrize("num_tokens", [1, 64, FEW_TOKENS, 16384])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (64, 8), (32, 4), (8, 1)])
def test_real_sizes(heads, num_tokens, device):
    torch.manual_seed(num_tokens)
    layout = Layout(*heads, 128, 64, interleaved=False, normed=True)
    inputs = draw(layout, num_tokens, torch.bfloat16, device, block_size=16, num_padding=num_tokens // 3)
    outs, expected = run(norm_rotate_cache_triton, layout, inputs), run(norm_rotate_cache_reference, layout, inputs)
    for out, wanted in zip(outs, expected, strict=True):
        assert relative_error(out, wanted) < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph")
def test_a_graph_replays_with_new_slots(device):
    torch.manual_seed(10)
    layout = LAYOUTS["qwen3-head-128"]
    inputs = draw(layout, 8, torch.bfloat16, device)
    norm_rotate_cache(*inputs, eps=EPS, interleaved=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = norm_rotate_cache(*inputs, eps=EPS, interleaved=False)
    fresh = draw(layout, 8, torch.bfloat16, device, num_padding=3)
    expected = run(norm_rotate_cache_reference, layout, fresh)
    for mine, new in zip(inputs, fresh, strict=True):
        mine.copy_(new)
    q.fill_(math.nan)
    graph.replay()
    for out, wanted in zip((q, inputs.keys, inputs.values), expected, strict=True):
        assert relative_error(out, wanted) < 1e-2


def broken(inputs, **changes):
    return inputs._replace(**{name: change(getattr(inputs, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": lambda qkv: qkv[:, :-1].contiguous()}, "channels do not hold"),
        ({"qkv": lambda qkv: qkv[:, : 4 * 16].contiguous()}, "channels do not hold"),
        ({"q_weight": lambda _: None}, "both normed or neither"),
        ({"k_weight": lambda weight: weight[:-1]}, "norm's weight must be"),
        ({"k_weight": lambda weight: weight.half()}, "norm's weight must be"),
        ({"cos": lambda cos: cos[:-1]}, "cosines"),
        ({"cos": lambda cos: cos.repeat(1, 2), "sin": lambda sin: sin.repeat(1, 2)}, "1 to 8"),
        ({"cos": lambda cos: cos.half()}, "must be float32"),
        ({"values": lambda values: values[:-1]}, "one shape and dtype"),
        ({"slots": lambda slots: slots.int()}, "slots must be int64"),
        ({"qkv": lambda qkv: qkv.T.contiguous().T}, "contiguous"),
        ({"keys": lambda keys: keys.transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
    ],
)
def test_launcher_says_what_does_not_fit(changes, message, device):
    layout = LAYOUTS["qwen3"]
    inputs = draw(layout, 3, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        norm_rotate_cache(*broken(inputs, **changes), eps=EPS, interleaved=False)


def test_launcher_chooses(device):
    torch.manual_seed(11)
    layout = LAYOUTS["glm"]
    inputs = draw(layout, 3, torch.float32, device)
    for out, expected in zip(run(norm_rotate_cache, layout, inputs), truth(layout, inputs), strict=True):
        assert relative_error(out, expected) < 1e-5
