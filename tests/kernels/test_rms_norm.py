"""The norm's kernel against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from gllm_kernels.rms_norm import (
    MAX_SIZE,
    add_rms_norm,
    add_rms_norm_reference,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
)

torch.set_num_threads(1)

EPS = 1e-6
SHAPES = [(1, 1), (3, 1024), (7, 5, 80), (2, 64), (33, 128), (5, 37), (2, 5120), (1, MAX_SIZE)]
if torch.cuda.is_available():
    SHAPES += [(8192, 4096), (16384, 1024), (257, 5120), (4096, 16, 128)]


def relative_error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def tolerance(dtype, device):
    # The interpreter cuts float32 to bfloat16 where a GPU rounds it.
    return {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2 if device.type == "cuda" else 2e-2)


def draw(shape, dtype, device, scale=1.0):
    return (scale * torch.randn(shape, device=device)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_is_that_of_plain_torch(shape, dtype, device):
    torch.manual_seed(sum(shape))
    x, weight = draw(shape, dtype, device, 3), draw(shape[-1:], dtype, device)
    out = rms_norm_triton(x, weight, EPS)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert relative_error(out, rms_norm_reference(x.double(), weight.double(), EPS)) < tolerance(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_after_adding_gives_the_sum_too(shape, dtype, device):
    torch.manual_seed(sum(shape) + 1)
    x, residual, weight = draw(shape, dtype, device), draw(shape, dtype, device, 3), draw(shape[-1:], dtype, device)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm_triton(x, residual, weight, EPS)
    expected, _ = add_rms_norm_reference(x.double(), residual.double(), weight.double(), EPS)
    assert relative_error(normed, expected) < tolerance(dtype, device)
    assert relative_error(total, x.double() + residual.double()) < tolerance(dtype, device)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_half_precision_is_rounded_where_plain_torch_rounds(device):
    """Before the weight multiplies, so that a run on a GPU takes the same tokens as one elsewhere."""
    torch.manual_seed(2)
    x, weight = draw((16, 512), torch.float16, device), draw((512,), torch.float16, device)
    out, expected = rms_norm_triton(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    assert (out == expected).float().mean() > 0.99
    straight = rms_norm_reference(x.double(), weight.double(), EPS).half()
    assert (straight == expected).float().mean() < 0.9


def test_rows_do_not_touch_one_another(device):
    torch.manual_seed(3)
    x, weight = draw((13, 100), torch.float32, device), draw((100,), torch.float32, device)
    alone = rms_norm_triton(x[4:5].clone(), weight, EPS)
    x[3], x[5] = float("nan"), float("inf")
    assert torch.equal(rms_norm_triton(x, weight, EPS)[4:5], alone)


def test_eps_holds_up_rows_of_zeros(device):
    zeros, weight = torch.zeros(3, 40, device=device), torch.ones(40, device=device)
    assert torch.equal(rms_norm_triton(zeros, weight, EPS), zeros)


def test_launchers_choose_and_check(device):
    torch.manual_seed(4)
    x, weight = draw((4, 32), torch.float32, device), draw((32,), torch.float32, device)
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    for out, expected in zip(add_rms_norm(x, x, weight, EPS), add_rms_norm_reference(x, x, weight, EPS), strict=True):
        torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="last dimension"):
        rms_norm(x, weight[:31], EPS)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x[:, ::2], weight[:16], EPS)
    with pytest.raises(ValueError, match="up to 16384"):
        rms_norm(x.new_zeros(1, MAX_SIZE + 1), x.new_zeros(MAX_SIZE + 1), EPS)
    for residual in (x[:3], x.half(), draw((32, 4), torch.float32, device).T):
        with pytest.raises(ValueError, match="residual must be"):
            add_rms_norm(x, residual, weight, EPS)
