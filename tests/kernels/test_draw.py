"""The draw: the kernel's token is the one with the best score, the distribution is right, and no row sees another."""

# ruff: noqa: N803, N806, PLR0917 - tensors carry their shape in their name; kernels take many

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from gllm_kernels import draw as module
from gllm_kernels.draw import draw, draw_reference, draw_triton
from gllm_kernels.philox import gumbel
from kernels.interpreter import let_scalars_bound_loops

torch.set_num_threads(1)
let_scalars_bound_loops()

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slots_of(num_rows, device, *, temperatures=(0.0, 0.7, 1.0, 1.5)):
    """More slots than rows, in no order: slots_S, temperatures_N, seeds_N, steps_N."""
    num_slots = num_rows + 3
    slots_S = torch.randperm(num_slots)[:num_rows]
    temperatures_N = torch.tensor(temperatures)[torch.randint(len(temperatures), (num_slots,))]
    seeds_N = torch.randint(-(2**63), 2**63 - 1, (num_slots,))
    steps_N = torch.randint(0, 5000, (num_slots,))
    return [each.to(device) for each in (slots_S, temperatures_N, seeds_N, steps_N)]


def scores_of(logits_SV, slots_S, temperatures_N, seeds_N, steps_N, floors_S=None):
    """In float64; the scores that the largest of is drawn."""
    temperatures_S1 = temperatures_N[slots_S, None].double()
    noise_SV = gumbel(seeds_N[slots_S], steps_N[slots_S], logits_SV.shape[1]).double()
    wide_SV = logits_SV.double()
    random_SV = wide_SV / temperatures_S1 + noise_SV
    if floors_S is not None:
        random_SV = random_SV.masked_fill(logits_SV.float() < floors_S[:, None], -INF)
    return torch.where(temperatures_S1 > 0, random_SV, wide_SV)


def assert_tokens_score_best(tokens_S, logits_SV, state, floors_S=None):
    """Equal to the best token, except where rounding decides."""
    scores_SV = scores_of(logits_SV, *state, floors_S)
    gap_S = scores_SV.amax(dim=1) - scores_SV.gather(1, tokens_S[:, None]).squeeze(1)
    assert (gap_S < 1e-4).all(), gap_S.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (1, 5000), (3, 1023), (7, 1025), (40, 61), (2, 4096)])
def test_the_kernel_takes_the_token_of_the_best_score(num_rows, vocab_size, dtype, device):
    torch.manual_seed(num_rows + vocab_size)
    logits_SV = (torch.randn(num_rows, vocab_size, device=device) * 3).to(dtype)
    state = slots_of(num_rows, device)
    before_N = state[3].clone()
    expected_S = draw_reference(logits_SV, *state[:3], before_N.clone())
    tokens_S = draw_triton(logits_SV, *state)
    assert tokens_S.dtype == torch.int64
    assert_tokens_score_best(tokens_S, logits_SV, [*state[:3], before_N])
    assert_tokens_score_best(expected_S, logits_SV, [*state[:3], before_N])
    greedy_S = state[1][state[0]] == 0
    assert torch.equal(tokens_S[greedy_S], expected_S[greedy_S])  # here nothing is rounded
    raised_N = torch.zeros_like(before_N)
    raised_N[state[0]] = (~greedy_S).long()
    assert torch.equal(state[3], before_N + raised_N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_parts_of_longer_ones(dtype, device):
    torch.manual_seed(1)
    wide_SW = torch.full((5, 3000), INF, device=device, dtype=dtype)
    wide_SW[:, :2001] = torch.randn(5, 2001, device=device)
    state = slots_of(5, device)
    before_N = state[3].clone()
    tokens_S = draw_triton(wide_SW[:, :2001], *state)
    assert_tokens_score_best(tokens_S, wide_SW[:, :2001], [*state[:3], before_N])


def test_only_what_reaches_the_floor_is_drawn(device):
    torch.manual_seed(2)
    logits_SV = torch.randn(6, 3000, device=device).bfloat16()
    state = slots_of(6, device, temperatures=(1.0, 20.0))
    before_N = state[3].clone()
    floors_S = torch.tensor([-INF, 1.0, 0.0, 2.0, 2.5, 0.0], device=device)
    floors_S[5] = logits_SV[5].max()  # the likeliest alone
    tokens_S = draw_triton(logits_SV, *state, floors_S)
    assert_tokens_score_best(tokens_S, logits_SV, [*state[:3], before_N], floors_S)
    assert (logits_SV.gather(1, tokens_S[:, None]).squeeze(1) >= floors_S).all()
    state[1].zero_()
    greedy_S = draw_triton(logits_SV, *state, torch.full_like(floors_S, INF))
    assert torch.equal(greedy_S, logits_SV.float().argmax(dim=1))


@pytest.mark.parametrize("op", [draw_reference, draw_triton])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([NAN] * 2100, 0),
        ([-INF] * 2100, 0),
        ([NAN, -INF] * 1000, 0),
        ([NAN] * 2000 + [-3.0] + [NAN] * 99, 2000),
        ([-INF] * 2000 + [-3.0] + [-INF] * 99, 2000),
        ([0.0] * 1500 + [INF] + [0.0] * 500 + [INF], 1500),  # the lowest of equals
    ],
)
def test_odd_rows_give_a_token_of_the_vocabulary(logits, token, temperature, op, device):
    logits_SV = torch.tensor([logits], device=device)
    column = [torch.tensor([x], device=device) for x in (0, temperature, 5, 0)]
    assert op(logits_SV, *column).tolist() == [token]


@pytest.mark.parametrize("op", [draw_reference, draw_triton])
def test_equal_logits_give_greedy_rows_the_lowest_token(op, device):
    logits_SV = torch.zeros(2, 5000, device=device, dtype=torch.bfloat16)
    logits_SV[1, [1030, 1040, 4000]] = 1
    state = [torch.tensor(x, device=device) for x in ([0, 0], [0.0], [9], [7])]  # a padding slot is shared
    assert op(logits_SV, *state).tolist() == [0, 1030]
    assert state[3].tolist() == [7]


@pytest.mark.parametrize("op", [draw_reference, draw_triton])
def test_a_token_depends_on_nothing_but_its_row(op, device):
    torch.manual_seed(4)
    logits_SV = torch.randn(9, 1500, device=device)
    slots_S, *columns, steps_N = slots_of(9, device)
    whole_S = op(logits_SV, slots_S, *columns, steps_N.clone())
    alone = [op(logits_SV[row : row + 1], slots_S[row : row + 1], *columns, steps_N.clone()) for row in range(9)]
    assert torch.equal(whole_S, torch.cat(alone))
    again_S = op(logits_SV.flip(0), slots_S.flip(0), *columns, steps_N.clone())
    assert torch.equal(whole_S, again_S.flip(0))


@pytest.mark.parametrize("op", [draw_reference, draw_triton])
def test_the_token_does_not_depend_on_the_type_that_holds_the_logits(op, device):
    torch.manual_seed(5)
    logits_SV = torch.randn(4, 3001, device=device).bfloat16()
    *columns, steps_N = slots_of(4, device)
    assert torch.equal(op(logits_SV, *columns, steps_N.clone()), op(logits_SV.float(), *columns, steps_N.clone()))


@triton.jit
def store_noise(seeds, steps, out, NUM_GROUPS: tl.constexpr, IS_APPROXIMATE: tl.constexpr):
    row = tl.program_id(0)
    group_G = row * NUM_GROUPS + tl.arange(0, NUM_GROUPS)
    noise_G4 = module._gumbel_base2(tl.load(seeds), tl.load(steps), group_G, NUM_GROUPS, IS_APPROXIMATE)
    tl.store(out + group_G[:, None] * 4 + tl.arange(0, 4)[None, :], noise_G4)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-1, 3), (2**63 - 5, 2**31 + 7), (12345678901, 4095)])
def test_the_kernels_noise_is_gumbels(seed, step, device):
    seeds, steps = torch.tensor([seed], device=device), torch.tensor([step], device=device)
    noise_V = torch.full((4 * 40 * 1024,), NAN, device=device)
    store_noise[(40,)](seeds, steps, noise_V, NUM_GROUPS=1024, IS_APPROXIMATE=device.type == "cuda")
    expected_V = gumbel(seeds, steps, 4 * 40 * 1024)[0]
    natural_V = noise_V * math.log(2) - math.log(math.log(2))  # its exponentials count in units of ln 2, too
    assert (natural_V - expected_V).abs().max() < 1e-5
    assert expected_V.max() > 10  # the series has been there


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_follow_the_softmax(temperature, device):
    num = 100_000
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0, -INF], device=device)
    slots_S = torch.arange(num, device=device)
    columns = torch.full((num,), temperature, device=device), slots_S * 7, torch.zeros_like(slots_S)
    tokens_S = torch.cat([draw(logits_V.expand(len(part), -1), part, *columns) for part in slots_S.split(20_000)])
    expected_V = (logits_V.double() / temperature).softmax(0) * num
    counts_V = torch.bincount(tokens_S, minlength=9)
    assert counts_V[8] == 0
    chi_square = ((counts_V - expected_V)[:8] ** 2 / expected_V[:8]).sum().item()
    assert chi_square < 30  # 7 degrees of freedom: beyond it once in 10,000; the seeds are fixed


def test_flat_rows_are_drawn_from_evenly(device):
    """A vocabulary of equal logits is where noise of too few digits shows: the first of its ties would win."""
    num_rows, vocab_size = (400, 20_000) if device.type == "cpu" else (20_000, 151_936)
    slots_S = torch.arange(num_rows, device=device)
    columns = torch.ones(num_rows, device=device), slots_S * 3 + 1, slots_S * 0
    logits_SV = torch.zeros(1, vocab_size, device=device, dtype=torch.bfloat16).expand(num_rows, -1)
    tokens_S = draw(logits_SV, slots_S, *columns)
    counts = torch.histc(tokens_S.float(), bins=10, min=0, max=vocab_size)
    expected = num_rows / 10
    assert ((counts - expected) ** 2 / expected).sum().item() < 34  # 9 degrees of freedom


def test_a_large_reference_is_cut_into_pieces_that_change_nothing(monkeypatch):
    torch.manual_seed(6)
    logits_SV, (*columns, steps_N) = torch.randn(37, 100), slots_of(37, "cpu")
    whole_S = draw(logits_SV, *columns, steps_N.clone())
    monkeypatch.setattr(module, "_DRAW_ELEMENTS", 1000)
    assert torch.equal(draw(logits_SV, *columns, steps_N.clone()), whole_S)


def test_no_rows_give_no_tokens(device):
    state = slots_of(0, device)
    assert draw_triton(torch.zeros(0, 10, device=device), *state).shape == (0,)
    assert draw_reference(torch.zeros(0, 10, device=device), *state).shape == (0,)


@pytest.mark.parametrize(
    "broken",
    [
        {0: torch.zeros(3)},
        {0: torch.zeros(3, 0)},
        {0: torch.zeros(3, 10, dtype=torch.float64)},
        {0: torch.zeros(10, 3).T},
        {1: torch.zeros(2, dtype=torch.int64)},
        {1: torch.zeros(3, dtype=torch.int32)},
        {2: torch.zeros(4, dtype=torch.float64)},
        {3: torch.zeros(5, dtype=torch.int64)},
        {4: torch.zeros(8, dtype=torch.int64)[::2]},
        {5: torch.zeros(3, dtype=torch.bfloat16)},
        {5: torch.zeros(4)},
    ],
)
def test_what_does_not_fit_is_refused(broken):
    slots, column = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    fitting = [torch.zeros(3, 10), slots, torch.zeros(4), column, column.clone(), torch.zeros(3)]
    draw(*fitting)
    with pytest.raises(ValueError, match=r"expected|logits"):
        draw(*(broken.get(place, each) for place, each in enumerate(fitting)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [1, 7, 64, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(num_rows, dtype, device):
    torch.manual_seed(num_rows)
    logits_SV = (torch.randn(num_rows, 151_936, device=device) * 2).to(dtype)
    state = slots_of(num_rows, device)
    before_N = state[3].clone()
    tokens_S = draw_triton(logits_SV, *state)
    assert_tokens_score_best(tokens_S, logits_SV, [*state[:3], before_N])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_holds_it(device):
    torch.manual_seed(8)
    logits_SV, state = torch.randn(5, 151_936, device=device).bfloat16(), slots_of(5, device)
    twin = [each.clone() for each in state]
    draw(logits_SV, *state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_S = draw(logits_SV, *state)
    draw(logits_SV, *twin)
    for _ in range(4):
        graph.replay()
        assert torch.equal(tokens_S, draw(logits_SV, *twin))
        assert torch.equal(state[3], twin[3])
