"""The gate's kernel against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from gllm_kernels.silu_and_mul import (
    FEW_ELEMENTS,
    _silu_and_mul_kernel,
    silu_and_mul,
    silu_and_mul_reference,
    silu_and_mul_triton,
)

torch.set_num_threads(1)

SHAPES = [(1, 2), (5, 6), (3, 1024), (2, 3, 5000), (1, 51200), (7, 74)]
if torch.cuda.is_available():
    SHAPES += [(16384, 24576), (8192, 6144), (300, 51200), (65537, 64)]


def relative_error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def tolerance(dtype, device):
    # The interpreter cuts float32 to bfloat16 where a GPU rounds it.
    return {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2 if device.type == "cuda" else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_is_that_of_plain_torch(shape, dtype, device):
    torch.manual_seed(sum(shape))
    gate_up = (2 * torch.randn(shape, device=device)).to(dtype)
    out = silu_and_mul_triton(gate_up)
    assert (out.shape, out.dtype) == ((*shape[:-1], shape[-1] // 2), dtype)
    rows = gate_up.flatten(0, -2)[-64:]  # of a large one these do: float64 is slow
    expected = silu_and_mul_reference(rows.double())
    assert relative_error(out.flatten(0, -2)[-64:], expected) < tolerance(dtype, device)
    assert out.isfinite().all()


@pytest.mark.parametrize("block", [512, 1024, 2048])
def test_any_block_gives_the_same(block, device):
    torch.manual_seed(block)
    gate_up = torch.randn(3, 2 * 3072, device=device)
    out = silu_and_mul_triton(gate_up, block=block, elements_per_thread=8)
    assert relative_error(out, silu_and_mul_reference(gate_up)) < 1e-5


def test_nothing_is_written_beyond_the_last_column(device):
    torch.manual_seed(3)
    gate_up, out = torch.randn(1, 74, device=device), torch.full((64,), float("nan"), device=device)
    _silu_and_mul_kernel[(1,)](gate_up, out, WIDTH=37, BLOCK=64, num_warps=1)
    assert out[:37].isfinite().all()
    assert out[37:].isnan().all()


def test_many_elements_take_the_large_blocks(device):
    torch.manual_seed(1)
    gate_up = torch.randn(FEW_ELEMENTS // 65536 + 1, 2 * 65536, device=device)
    assert relative_error(silu_and_mul_triton(gate_up), silu_and_mul_reference(gate_up)) < 1e-5


def test_extremes_stay_what_they_are(device):
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -1e30, 1.0, 2.0, 3.0, 4.0]], device=device)
    assert silu_and_mul_triton(gate_up).tolist() == [[0.0, 400.0, 0.0, 0.0]]


def test_launcher_chooses_and_checks(device):
    torch.manual_seed(2)
    gate_up = torch.randn(3, 10, device=device)
    torch.testing.assert_close(silu_and_mul(gate_up), silu_and_mul_reference(gate_up))
    with pytest.raises(ValueError, match="even"):
        silu_and_mul(gate_up[:, :9].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        silu_and_mul(gate_up[:, :8])
