"""The filters' floor: by hand, by the reference, and by a float64 definition where rounding leaves no doubt."""

# ruff: noqa: N803, N806, PLR0917 - tensors carry their shape in their name; kernels take many

from __future__ import annotations

import math

import pytest
import torch
from gllm_kernels.filters import likely_floors, likely_floors_reference, likely_floors_triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.interpreter import let_scalars_bound_loops

torch.set_num_threads(1)
let_scalars_bound_loops()

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_ways = pytest.mark.parametrize("op", [likely_floors_reference, likely_floors_triton])


def columns_of(device, *, temperatures, top_k, top_p, min_p):
    floats = [torch.tensor(each, device=device) for each in (temperatures, top_p, min_p)]
    return floats[0], torch.tensor(top_k, device=device), *floats[1:]


def kept_by(op, device, logits, *, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    columns = columns_of(device, temperatures=[temperature], top_k=[top_k], top_p=[top_p], min_p=[min_p])
    logits_SV = torch.tensor([logits], device=device)
    floors_S = op(logits_SV, torch.zeros(1, dtype=torch.int64, device=device), *columns)
    return (logits_SV[0] >= floors_S[0]).nonzero().squeeze(1).tolist()


@both_ways
@pytest.mark.parametrize(
    ("logits", "filters", "kept"),
    [
        ([1.0, 3.0, 2.0], {"top_k": 1}, [1]),
        ([1.0, 3.0, 2.0], {"top_k": 2}, [1, 2]),
        ([1.0, 3.0, 2.0], {"top_k": 3}, [0, 1, 2]),
        ([1.0, 3.0, 2.0], {"top_k": 2**63 - 1}, [0, 1, 2]),
        ([1.0, 3.0, 2.0], {"top_k": 0}, [0, 1, 2]),
        ([1.0, 3.0, 2.0], {"top_k": -1}, [0, 1, 2]),
        ([-1.0, -3.0, -2.0], {"top_k": 2}, [0, 2]),
        ([-1e-40, 1e-40, 0.0, -1e30], {"top_k": 3}, [0, 1, 2]),
        ([0.0, -0.0, -1.0], {"top_k": 1}, [0, 1]),  # equal, though their bits differ
        ([1.0, 2.0, 2.0, 2.0], {"top_k": 2}, [1, 2, 3]),  # a tie at the edge stays whole
        ([1.0, 3.0, 2.0], {"top_p": 1e-9}, [1]),
        ([1.0, 3.0, 2.0], {"top_p": 1e-60}, [1]),  # 0 in float32
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.3}, [0, 1, 2, 3]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"top_p": 0.45}, [0]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"top_p": 0.55}, [0, 1]),
        ([math.log(p) for p in (0.2, 0.5, 0.3)], {"top_p": 0.85}, [0, 1, 2]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"top_k": 2, "top_p": 0.6}, [0]),  # 0.5 of 0.8 is 0.625
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.35, "top_p": 0.7}, [0, 1]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.5, "top_p": 0.6}, [0]),  # min-p comes first
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.61}, [0]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.59}, [0, 1]),
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.35, "temperature": 0.5}, [0, 1]),  # 0.36 as likely
        ([math.log(p) for p in (0.5, 0.3, 0.2)], {"min_p": 0.37, "temperature": 0.5}, [0]),
        ([2.0, 0.0], {"top_p": 0.8}, [0]),  # 0.88 and 0.12
        ([2.0, 0.0], {"top_p": 0.8, "temperature": 4.0}, [0, 1]),  # 0.62 and 0.38
        ([1.0, 3.0, 3.0], {"min_p": 1.0}, [1, 2]),
        ([-INF, 0.0, -1.0], {"top_p": 0.999, "min_p": 0.001}, [1, 2]),
        ([NAN, 0.0, -1.0, -2.0], {"top_k": 2}, [1, 2]),
        ([NAN, 0.0, NAN, -1.0, -20.0], {"top_p": 0.999}, [1, 3]),
        ([1.0, 3.0, 2.0], {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "temperature": 0.0}, [0, 1, 2]),
    ],
)
def test_what_a_filter_keeps(logits, filters, kept, op, device):
    assert kept_by(op, device, logits, **filters) == kept


@both_ways
def test_top_p_of_one_keeps_the_longest_tail(op, device):
    logits = [0.0] + [-40.0] * 9000
    assert len(kept_by(op, device, logits, top_p=1.0)) == 9001
    assert len(kept_by(op, device, logits, top_p=1.0, min_p=1e-30)) == 9001


@both_ways
@pytest.mark.parametrize("logits", [[-INF] * 5, [NAN] * 5, [NAN, -INF] * 3])
def test_rows_without_a_number_keep_everything(logits, op, device):
    columns = columns_of(device, temperatures=[1.0], top_k=[2], top_p=[0.5], min_p=[0.1])
    assert op(torch.tensor([logits], device=device), torch.zeros(1, dtype=torch.int64, device=device), *columns) == -INF


@both_ways
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12, unique=True),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_filters_agree_with_their_definitions(logits, top_k, top_p, min_p, temperature, op, device):
    probs = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = [token for token in order if probs[token] >= min_p * probs[order[0]]][: top_k or None]
    total, before, expected = sum(probs[token] for token in order), 0.0, []
    for token in order:
        if abs(before / total - top_p) < 1e-5:
            return  # rounding decides
        if before / total < top_p or top_p >= 1:
            expected.append(token)
        before += probs[token]
    if any(abs(prob - min_p * max(probs)) < 1e-6 * max(probs) for prob in probs):
        return
    kept = kept_by(op, device, logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    assert kept == sorted(expected)


def some_filters(num_slots):
    """Any mixture of filters, off ones and greedy slots included."""

    def maybe(values, off):
        return torch.where(torch.rand(num_slots) < 0.6, values, off)

    return (
        torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (num_slots,))],
        maybe(torch.randint(1, 300, (num_slots,)), -1),
        maybe(torch.rand(num_slots), 1.0),
        maybe(torch.rand(num_slots) ** 3 * 0.1, 0.0),
    )


def assert_same_floors(floors_S, logits_SV, slots_S, columns):
    """The tokens kept are those of the reference; but top-p may end elsewhere where both sums meet p."""
    temperatures_N, top_k_N, top_p_N, min_p_N = columns
    expected_S = likely_floors_reference(logits_SV, slots_S, *columns)
    left_S = likely_floors_reference(logits_SV, slots_S, temperatures_N, top_k_N, torch.ones_like(top_p_N), min_p_N)
    logits_SV = logits_SV.float()
    differs = ((logits_SV >= floors_S[:, None]) != (logits_SV >= expected_S[:, None])).any(dim=1).nonzero()
    for row in differs.squeeze(1).tolist():
        low, high = sorted((floors_S[row].item(), expected_S[row].item()))
        row_V, slot = logits_SV[row].double(), slots_S[row]
        weights_V = ((row_V - row_V.max()) / temperatures_N[slot].double()).exp() * (row_V >= left_S[row])
        for reached_V in (row_V >= high, row_V > row_V[row_V >= low].min()):
            share = (weights_V[reached_V].sum() / weights_V.sum()).item()
            assert share == pytest.approx(top_p_N[slot].item(), abs=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(12, 1000), (5, 8191), (4, 20_000)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernel_finds_the_references_floors(num_rows, vocab_size, dtype, seed, device):
    torch.manual_seed(seed)
    logits_SV = (torch.randn(num_rows, vocab_size, device=device) * 3 + seed * 5).to(dtype)
    columns = [each.to(device) for each in some_filters(num_rows + 3)]
    slots_S = torch.randperm(num_rows + 3, device=device)[:num_rows]
    assert_same_floors(likely_floors_triton(logits_SV, slots_S, *columns), logits_SV, slots_S, columns)


def test_rows_may_be_parts_of_longer_ones(device):
    torch.manual_seed(3)
    wide_SW = torch.full((6, 3000), INF, device=device)
    wide_SW[:, :2001] = torch.randn(6, 2001, device=device)
    columns = [each.to(device) for each in some_filters(6)]
    slots_S = torch.arange(6, device=device)
    assert_same_floors(likely_floors_triton(wide_SW[:, :2001], slots_S, *columns), wide_SW[:, :2001], slots_S, columns)


@both_ways
def test_a_floor_depends_on_nothing_but_its_row(op, device):
    torch.manual_seed(4)
    logits_SV = torch.randn(8, 1500, device=device).bfloat16()
    columns = [each.to(device) for each in some_filters(8)]
    slots_S = torch.randperm(8, device=device)
    whole_S = op(logits_SV, slots_S, *columns)
    alone = [op(logits_SV[row : row + 1], slots_S[row : row + 1], *columns) for row in range(8)]
    assert torch.equal(whole_S, torch.cat(alone))


def test_no_rows_give_no_floors(device):
    columns = [each.to(device) for each in some_filters(2)]
    slots_S = torch.zeros(0, dtype=torch.int64, device=device)
    assert likely_floors_triton(torch.zeros(0, 9, device=device), slots_S, *columns).shape == (0,)
    assert likely_floors_reference(torch.zeros(0, 9, device=device), slots_S, *columns).shape == (0,)


@pytest.mark.parametrize(
    "broken",
    [
        {0: torch.zeros(3, 10, dtype=torch.int32)},
        {1: torch.zeros(4, dtype=torch.int64)},
        {2: torch.zeros(4, dtype=torch.float16)},
        {3: torch.zeros(4)},
        {4: torch.zeros(5)},
        {5: torch.zeros(8)[::2]},
    ],
)
def test_what_does_not_fit_is_refused(broken):
    fitting = [torch.zeros(3, 10), torch.zeros(3, dtype=torch.int64), *some_filters(4)]
    likely_floors(*fitting)
    with pytest.raises(ValueError, match=r"expected|logits"):
        likely_floors(*(broken.get(place, each) for place, each in enumerate(fitting)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 100, 256])
def test_real_sizes(dtype, num_rows, device):
    torch.manual_seed(num_rows)
    logits_SV = (torch.randn(num_rows, 151_936, device=device) * 3).to(dtype)
    columns = [each.to(device) for each in some_filters(num_rows)]
    slots_S = torch.randperm(num_rows, device=device)
    assert_same_floors(likely_floors_triton(logits_SV, slots_S, *columns), logits_SV, slots_S, columns)
