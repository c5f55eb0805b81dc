"""The kernels of few rows against plain torch in float64."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from gllm_kernels import few_rows, jit
from gllm_kernels.few_rows import (
    MAX_ROWS,
    MIN_TILED,
    Tuning,
    default_tuning,
    fitted,
    linear,
    linear_triton,
    takes,
)
from kernels.interpreter import let_scalars_bound_loops
from torch.nn import functional

let_scalars_bound_loops()
torch.set_num_threads(1)

EPS = 1e-5
GPU = torch.cuda.is_available()
DTYPES = [torch.float16, torch.bfloat16]
DOT_DTYPES = DTYPES if GPU else DTYPES[:1]  # the interpreter multiplies no bfloat16 matrices
NUM_ROWS = (1, 2, 7, 16, 17, 32)
SHAPES = [(80, 64), (6, 48), (34, 1040)]  # N and K: whole blocks, less than one, and some more than one
if GPU:
    SHAPES += [(6144, 4096), (1024, 3072), (37888, 3584), (4096, 11008), (30002, 1024), (1030, 18944)]
AROUND = [
    [name for name, on in zip(("norm", "bias", "residual", "gated"), each, strict=True) if on]
    for each in product((False, True), repeat=4)
]
CASES = [(num, dtype) for num in NUM_ROWS for dtype in (DTYPES if num == 1 else DOT_DTYPES)]


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: dict

    def truth(self):
        """In float64, nothing rounded on the way."""
        x, gain, residual = self.x.double(), self.options["gain_K"], self.options["residual_MO"]
        if gain is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain.double()
        out = functional.linear(x, self.weight.double(), None if self.bias is None else self.bias.double())
        if self.options["gated"]:
            gate, up = out.chunk(2, -1)
            out = functional.silu(gate) * up
        return out if residual is None else out + residual.double()


def draw(num_rows, shape, dtype, device, *, norm=False, bias=False, residual=False, gated=False):
    num_weights, size = shape

    def random(*sizes):
        return torch.randn(sizes, device=device).to(dtype)

    options = {
        "gain_K": random(size) if norm else None,
        "eps": EPS,
        "residual_MO": random(num_rows, num_weights // 2 if gated else num_weights) if residual else None,
        "gated": gated,
    }
    x, weight = random(num_rows, size) * 3, random(num_weights, size) / size**0.5
    return Inputs(x, weight, random(num_weights) if bias else None, options)


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def tolerance(dtype):
    """Half of the last bit; the interpreter cuts float32 to bfloat16 where a GPU rounds it."""
    return {torch.float16: 4e-4, torch.bfloat16: 3e-3 if GPU else 6e-3}[dtype]


def small(num_rows):
    """Several programs and several turns of their loops, of small shapes."""
    return Tuning(4, 32, 4, 1) if num_rows == 1 else Tuning(16, 32, 4, 3)


def run(inputs, tuning=None):
    return linear_triton(inputs.x, inputs.weight, inputs.bias, **inputs.options, tuning=tuning)


@pytest.mark.parametrize("around", AROUND, ids=lambda each: "+".join(each) or "alone")
@pytest.mark.parametrize(("num_rows", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_that_stands_around_a_product(shape, num_rows, dtype, around, device):
    torch.manual_seed(sum(shape) + num_rows)
    inputs = draw(num_rows, shape, dtype, device, **dict.fromkeys(around, True))
    before = inputs.x.clone()
    out, expected = run(inputs), inputs.truth()
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    # The norm of several rows, a kernel of its own, is rounded before they are multiplied, and before its weight is.
    assert relative_error(out, expected) < tolerance(dtype) * (3 if "norm" in around and num_rows > 1 else 1)
    assert torch.equal(inputs.x, before)


@pytest.mark.parametrize(("num_rows", "tuning"), [
    *((1, Tuning(*each, 1)) for each in ((1, 32, 1), (2, 64, 2), (16, 32, 4), (64, 16, 4))),
    *((5, Tuning(*each, 2)) for each in ((16, 32, 1), (32, 16, 2), (128, 64, 4))),
])  # fmt: skip
@pytest.mark.parametrize("gated", [False, True])
def test_any_tuning_gives_the_same(num_rows, tuning, gated, device):
    torch.manual_seed(num_rows)
    inputs = draw(num_rows, (46, 80), torch.float16, device, norm=True, bias=True, residual=True, gated=gated)
    assert relative_error(run(inputs, tuning), inputs.truth()) < 3 * tolerance(torch.float16)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_nothing_is_read_or_written_beyond_the_ends(num_rows, device):
    torch.manual_seed(5)
    inputs = draw(num_rows, (21, 48), torch.float16, device, bias=True, residual=True)
    poisoned = torch.full((21 + 64, 48), float("nan"), dtype=torch.float16, device=device)
    poisoned[:21] = inputs.weight
    rows = torch.full((16, 48), float("nan"), dtype=torch.float16, device=device)
    rows[:num_rows] = inputs.x
    out = run(inputs._replace(weight=poisoned[:21], x=rows[:num_rows]), small(num_rows))
    assert out.isfinite().all()


def test_eps_holds_up_a_row_of_zeros(device):
    zeros, weight = torch.zeros(1, 64, device=device).half(), torch.ones(32, 64, device=device).half()
    out = linear_triton(zeros, weight, gain_K=torch.ones(64, device=device).half(), eps=EPS)
    assert torch.equal(out, torch.zeros_like(out))


def test_extremes_pass_the_gate(device):
    x, weight = torch.ones(1, 16, device=device).half(), torch.zeros(4, 16, device=device).half()
    bias = torch.tensor([-6e4, 20.0, 3.0, 2.0], device=device).half()
    assert linear_triton(x, weight, bias, gated=True).tolist() == [[0.0, 40.0]]


@pytest.mark.parametrize("device", [torch.device("cpu")])
def test_on_a_cpu_it_is_plain_torch_to_the_last_bit(device):
    torch.manual_seed(6)
    inputs = draw(3, (24, 32), torch.bfloat16, device, norm=True, bias=True, residual=True, gated=True)
    assert not takes(inputs.x, inputs.weight)
    wide = inputs.x.float()
    normed = inputs.options["gain_K"] * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).bfloat16()
    gate, up = functional.linear(normed, inputs.weight, inputs.bias).chunk(2, -1)
    expected = functional.silu(gate) * up + inputs.options["residual_MO"]
    assert torch.equal(linear(inputs.x, inputs.weight, inputs.bias, **inputs.options), expected)


def test_it_takes_few_rows_of_16_bits_in_whole_vectors(monkeypatch):
    monkeypatch.setattr(few_rows, "runs_triton", lambda _: True)

    def taken(num_rows, num_weights=MIN_TILED, size=64, dtype=torch.bfloat16):
        return takes(torch.empty(num_rows, size, dtype=dtype), torch.empty(num_weights, size, dtype=dtype))

    assert taken(1)
    assert taken(MAX_ROWS, dtype=torch.float16)
    assert taken(1, num_weights=8)
    assert not taken(0)
    assert not taken(MAX_ROWS + 1)
    assert not taken(1, dtype=torch.float32)
    assert not taken(1, size=72)
    assert not taken(2, num_weights=MIN_TILED - 1)


def test_the_launcher_launches_where_it_takes(device, monkeypatch):
    torch.manual_seed(7)
    inputs = draw(2, (MIN_TILED, 32), torch.float16, device, norm=True)
    monkeypatch.setattr(few_rows, "runs_triton", lambda _: True)
    monkeypatch.setattr(few_rows, "linear_reference", None)
    assert relative_error(linear(inputs.x, inputs.weight, **inputs.options), inputs.truth()) < 2e-3


def test_a_tuning_is_of_the_shape():
    assert default_tuning(1, 6144, 4096) == default_tuning(1, 4096, 12288) == Tuning(2, 1024, 4, 1)
    assert default_tuning(1, 6144, 1024) == Tuning(2, 512, 2, 1)
    assert default_tuning(1, 151_936, 1024) == default_tuning(1, 151_936, 4096) == Tuning(16, 256, 4, 1)
    assert default_tuning(2, 6144, 4096) == default_tuning(16, 6144, 4096) == Tuning(64, 256, 4, 4)
    assert default_tuning(2, 24_576, 4096) == Tuning(64, 128, 4, 3)


def test_what_does_not_fit_is_refused(device):
    x, weight = torch.zeros(2, 32, device=device), torch.zeros(6, 32, device=device)
    for wrong, match in (
        (lambda: linear(x[:, :16], weight), r"\[M, K\]"),
        (lambda: linear(x[0], weight), r"\[M, K\]"),
        (lambda: linear(x, weight.half()), "weight must be torch.float32"),
        (lambda: linear(x, weight, x[0]), "bias must be"),
        (lambda: linear(x, weight, gain_K=x[0, :8]), "norm's weight must be"),
        (lambda: linear(x, weight, residual_MO=x), "residual must be"),
        (lambda: linear(x, weight[:5], gated=True), "even number"),
        (lambda: linear(x[:, ::2], weight[:, :16].contiguous()), "input must be contiguous"),
        (lambda: linear(x[:, :16].contiguous(), weight[:, :16]), "weight must be contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


@pytest.mark.parametrize("kilobytes", [227, 163, 99, 64])
def test_tunings_fit_what_a_gpu_has(kilobytes):
    for num_rows, tile_rows in ((2, 16), (16, 16), (17, 32), (32, 32)):
        for num_weights in (1024, 8192, 24576, 151936):
            wanted = default_tuning(num_rows, num_weights, 4096)
            found = fitted(wanted, tile_rows, kilobytes << 10)
            stage = 2 * (found.block_n + tile_rows) * found.block_k
            assert found.num_stages * stage <= kilobytes << 10
            assert found.num_stages == wanted.num_stages or (found.num_stages + 1) * stage > kilobytes << 10
            if kilobytes == 227:
                assert found == wanted


@pytest.mark.parametrize(("said", "found"), [({"shared_memory_per_block_optin": 101376}, 101376), ({}, 227 << 10)])
def test_shared_memory_is_what_the_gpu_in_use_says(said, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**said))
    assert jit.shared_memory.__wrapped__(torch.device("meta")) == found
    assert jit.shared_memory.__wrapped__(torch.device("cpu")) == 227 << 10
