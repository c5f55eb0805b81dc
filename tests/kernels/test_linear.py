"""Products of few rows against float64."""

from __future__ import annotations

import pytest
import torch
from gllm_kernels.linear import (
    Tuning,
    linear,
    linear_kernel,
    linear_reference,
    linear_triton,
    make_launch,
    make_scratch,
)
from kernels.interpreter import let_scalars_bound_loops
from torch.nn import functional

let_scalars_bound_loops()
torch.set_num_threads(1)

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter multiplies no bfloat16 matrices
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

WITHOUT_DOTS, DOTS = Tuning(1, 16, 64, 1, 4, 1), Tuning(16, 16, 32, 1, 4, 3)
TUNINGS = [
    WITHOUT_DOTS,
    WITHOUT_DOTS._replace(block_n=64, split_k=2),
    DOTS,
    DOTS._replace(block_n=32, split_k=2),
    DOTS._replace(block_m=32, block_k=16, split_k=5, num_warps=8),
    DOTS._replace(tma=True),
    DOTS._replace(tma=True, block_n=64, split_k=4),
]
SHAPES = [(1, 64, 64), (3, 48, 192), (17, 30, 24)]  # M, N, K: whole blocks, and parts of them


def draw(shape, dtype, device):
    num_rows, num_columns, size = shape
    torch.manual_seed(sum(shape))
    x, w = torch.randn(num_rows, size), torch.randn(num_columns, size) / size**0.5
    return x.to(device, dtype), w.to(device, dtype)


def truth(x, w, gated):
    out = functional.linear(x.double(), w.double())
    gate, up = out.chunk(2, -1)
    return functional.silu(gate) * up if gated else out


def error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def scratch_of(x, w, tuning):
    """Whatever lies in the sums must not matter."""
    scratch = make_scratch(len(x), len(w), tuning, x.device)
    scratch.sums.fill_(float("nan"))
    return scratch


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: "-".join(str(int(each)) for each in tuning))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, tuning, gated, device):
    for dtype in DTYPES:
        x, w = draw(shape, dtype, device)
        scratch = scratch_of(x, w, tuning)
        expected = truth(x, w, gated)
        for _ in range(2):  # counters are back at zero after each call
            out = linear_triton(x, w, tuning=tuning, scratch=scratch, gated=gated)
            assert (out.shape, out.dtype) == (expected.shape, dtype)
            assert error(out, expected) < TOLERANCE[dtype]
            assert not scratch.counters.any()


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: "-".join(str(int(each)) for each in tuning))
def test_a_row_depends_on_no_other(tuning, device):
    x, w = draw((17, 40, 80), torch.float32, device)
    whole = linear_triton(x, w, tuning=tuning, scratch=scratch_of(x, w, tuning))
    for rows in (x[:1], x[:16]):
        some = linear_triton(rows, w, tuning=tuning, scratch=scratch_of(rows, w, tuning))
        assert torch.equal(some, whole[: len(rows)])


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: "-".join(str(int(each)) for each in tuning))
def test_nothing_is_written_beyond_the_last_row(tuning, device):
    x, w = draw((5, 30, 80), torch.float32, device)
    for gated in (False, True):
        held = torch.full((40, 30 >> gated), 7.0, device=device)
        scratch = scratch_of(x, w, tuning)
        grid, arguments, constants = make_launch(held[:5], x, w, tuning=tuning, scratch=scratch, gated=gated)
        linear_kernel[grid](*arguments, **constants)
        assert error(held[:5], truth(x, w, gated)) < TOLERANCE[torch.float32]
        assert (held[5:] == 7).all()


def test_parts_are_added_in_the_order_of_k(device):
    """A large number and its opposite first: another order would lose the small ones to it."""
    x = torch.tensor([[2.0**30, -(2.0**30), 1.0, 2.0]], device=device).repeat_interleave(16, 1)
    w = torch.ones(16, 64, device=device)
    tuning = DOTS._replace(block_k=16, split_k=4)
    scratch = make_scratch(1, 16, tuning, x.device)
    assert (linear_triton(x, w, tuning=tuning, scratch=scratch) == 48).all()
    backwards = linear_triton(x.flip(1).contiguous(), w, tuning=tuning, scratch=scratch)
    assert (backwards == 0).all()


def test_launcher_chooses_and_checks(device):
    x, w = draw((4, 32, 64), DTYPES[1], device)
    for gated in (False, True):
        out = linear(x, w, tuning=DOTS, gated=gated)
        assert error(out, truth(x, w, gated)) < TOLERANCE[x.dtype]
        assert error(linear_reference(x, w, gated=gated), truth(x, w, gated)) < TOLERANCE[x.dtype]

    def refused(message, x=x, w=w, tuning=DOTS, **options):
        with pytest.raises(ValueError, match=message):
            linear(x, w, tuning=tuning, **options)

    refused("needed", x[:, :32].contiguous())
    refused("needed", x[0])
    refused("needed", x[:0])
    refused("type", x.float())
    refused("type", x.int(), w.int())
    refused("contiguous", x.T.contiguous().T)
    refused("as many rows", w=w[:31], gated=True)
    refused("powers of two", tuning=DOTS._replace(block_n=24))
    refused("powers of two", tuning=DOTS._replace(split_k=0))
    refused("at least 16", tuning=DOTS._replace(block_n=8))
    refused("at least 16", tuning=WITHOUT_DOTS._replace(block_m=2))
    refused("tma", tuning=WITHOUT_DOTS._replace(tma=True))
    refused("tma", x[:, :60].contiguous(), w[:, :60].contiguous(), tuning=DOTS._replace(tma=True))
    split = DOTS._replace(split_k=2)
    refused("scratch", tuning=split)
    refused("scratch", tuning=split, scratch=make_scratch(3, 32, split, x.device))
    refused("scratch", tuning=split, scratch=make_scratch(4, 32, DOTS, x.device))


REAL = [  # one of each kind that the sweep of benchmarks/products.py tries
    Tuning(1, 8, 1024, 1, 4, 1),
    Tuning(1, 4, 512, 2, 2, 1),
    Tuning(16, 32, 256, 1, 4, 5),
    Tuning(16, 16, 128, 4, 2, 8, tma=True),
    Tuning(64, 32, 128, 2, 4, 5),
    Tuning(64, 64, 128, 4, 4, 4, tma=True),
    Tuning(128, 128, 64, 2, 8, 4, tma=True),
]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tuning", REAL, ids=lambda tuning: "-".join(str(int(each)) for each in tuning))
@pytest.mark.parametrize(("num_columns", "size"), [(4096, 1024), (1024, 2048), (1024, 3072), (6144, 1024)])
def test_real_sizes(num_columns, size, tuning, device):
    for num_rows in (1, 16, 100, 256):
        x, w = draw((num_rows, num_columns, size), torch.bfloat16, device)
        scratch = scratch_of(x, w, tuning)
        for gated in (False, True):
            outs = [linear_triton(x, w, tuning=tuning, scratch=scratch, gated=gated) for _ in range(20)]
            assert error(outs[0], truth(x, w, gated)) < TOLERANCE[x.dtype]
            assert all(torch.equal(out, outs[0]) for out in outs)  # whoever came last
            assert not scratch.counters.any()
