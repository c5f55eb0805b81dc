"""Router and experts: Triton against plain torch, on fresh numbers, with uninitialised memory full of NaN."""

import pytest
import torch
from gllm_kernels.moe import Tiles, _sort, choose_tiles, experts, experts_reference, experts_triton
from gllm_kernels.routing import route, route_reference, route_triton

torch.set_num_threads(1)
GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter multiplies no bfloat16 matrices


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty gives is NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


def relative_error(out, expected):
    """Of zero, too: then it is 0 or very great; NaN is never less than a tolerance."""
    return ((out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def draw(device, num_tokens, shape, *, held=None, dtype=torch.float32):
    """Tokens, the held experts' matrices, and what a router says of these tokens."""
    hidden_size, width, num_experts, num_chosen = shape
    num_held = held or num_experts
    x = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    gate_up = torch.randn(num_held, 2 * width, hidden_size, device=device, dtype=dtype) / hidden_size**0.5
    down = torch.randn(num_held, hidden_size, width, device=device, dtype=dtype) / width**0.5
    scores = 2 * torch.randn(num_tokens, num_experts, device=device)
    return x, gate_up, down, *route_reference(scores, num_chosen, normalised=True)


def exact(x, gate_up, down, weights, ids, *, first_expert):
    """The same in float64, choice by choice."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        expert = ids[token, place].item() - first_expert
        if 0 <= expert < len(down):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            out[token] += weights[token, place].double() * (down[expert].double() @ hidden)
    return out


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen"), [(1, 128, 8), (19, 60, 4), (5, 8, 2), (3, 300, 7), (4, 3, 3)]
)
def test_the_router_chooses_as_plain_torch_does(device, num_tokens, num_experts, num_chosen, normalised):
    for seed, dtype in enumerate([torch.float32, torch.float16, torch.bfloat16]):
        torch.manual_seed(seed)
        scores = (5 * torch.randn(num_tokens, num_experts, device=device)).to(dtype)
        weights, ids = route_triton(scores, num_chosen, normalised=normalised)
        expected, expected_ids = route_reference(scores, num_chosen, normalised=normalised)
        assert weights.dtype == torch.float32
        assert ids.dtype == expected_ids.dtype == torch.int32
        assert torch.equal(ids, expected_ids)
        assert relative_error(weights, expected) < 1e-5


@pytest.mark.parametrize("implementation", [route_triton, route_reference])
def test_of_equal_experts_the_first_are_chosen(device, implementation):
    scores = torch.tensor([[1.0, 3, 3, 0, 3, 1, 1, 1], [0, -0.0, 0, -0.0, 0, 0, -200, -100]], device=device)
    weights, ids = implementation(scores, 7, normalised=False)
    assert ids.tolist() == [[1, 2, 4, 0, 5, 6, 7], [0, 1, 2, 3, 4, 5, 7]]
    torch.testing.assert_close(weights, scores.softmax(-1).gather(-1, ids.long()))


@pytest.mark.parametrize("implementation", [route_triton, route_reference])
def test_rows_without_an_answer_still_name_experts(device, implementation):
    scores = torch.randn(5, 20, device=device)
    scores[0] = float("nan")
    scores[1, 7] = float("nan")
    scores[2] = float("-inf")
    scores[3, 4] = float("inf")
    weights, ids = implementation(scores, 6, normalised=True)
    assert all(len({*row}) == 6 and {*row} <= {*range(20)} for row in ids.tolist())
    assert weights[:4].isnan().all(dim=0).all()
    assert not weights[4].isnan().any()


def test_the_router_masks_experts_at_minus_infinity(device):
    scores = torch.randn(3, 16, device=device)
    scores[:, ::2] = float("-inf")
    weights, ids = route_triton(scores, 8, normalised=True)
    assert (ids % 2 == 1).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, device=device))


@pytest.mark.parametrize("implementation", [route_triton, route_reference])
def test_padding_visits_no_expert(device, implementation):
    torch.manual_seed(0)
    scores = torch.randn(6, 20, device=device)
    scores[4] = float("nan")
    expected, expected_ids = implementation(scores, 3, normalised=True)
    places = torch.tensor([0, 17, -1, 5, -1, 3], device=device)
    weights, ids = implementation(scores, 3, normalised=True, slot_mapping_T=places)
    is_real = places >= 0
    assert torch.equal(weights[is_real], expected[is_real])
    assert torch.equal(ids[is_real], expected_ids[is_real])
    assert (weights[~is_real] == 0).all()
    assert (ids[~is_real] == -1).all()


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("num_real", [0, 1, 7, 23])
def test_experts_add_nothing_to_padding(device, num_real, first):
    """Choices of -1, as padding has: in any place, of few tokens (not sorted) and of more."""
    torch.manual_seed(num_real)
    for num_tokens, shape in ((24, (32, 24, 8, 2)), (max(1, num_real), (32, 24, 8 * 128, 2))):
        inputs = draw(device, num_tokens, shape, held=4)
        expected = exact(*(tensor.cpu() for tensor in inputs), first_expert=first).to(device)
        is_padding = torch.randperm(num_tokens, device=device) >= num_real
        inputs[3][is_padding], inputs[4][is_padding], expected[is_padding] = 0, -1, 0
        for implementation in (experts_triton, experts_reference):
            out = implementation(*inputs, first_expert=first)
            assert relative_error(out, expected) < 1e-5
            assert (out[is_padding] == 0).all()


# (tokens, (hidden size, width, experts, chosen), first held, held): one token; choices unsorted; a block each; many
# blocks of an expert; experts without choices; sizes that no tile divides.
SIZES = [
    (1, (64, 32, 8, 2), 0, 8),
    (1, (40, 24, 6, 3), 2, 2),
    (2, (32, 48, 64, 4), 16, 32),
    (9, (72, 40, 5, 2), 0, 5),
    (50, (32, 24, 3, 2), 1, 2),
    (33, (64, 32, 40, 1), 20, 20),
]
QWEN3 = (2048, 768, 128, 8)
REAL_SIZES = [
    (num_tokens, shape, first, held)
    for num_tokens in (1, 3, 4, 5, 16, 70, 256, 640, 1200, 4096)
    for shape, first, held in [
        (QWEN3, 0, 128),
        (QWEN3, 64, 64),
        ((2048, 384, 128, 8), 0, 128),
        ((2048, 352, 60, 4), 0, 60),
    ]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts(device, size, dtype):
    num_tokens, shape, first, held = size
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = draw(device, num_tokens, shape, held=held, dtype=dtype)
        out = experts_triton(*inputs, first_expert=first, num_experts=shape[2])
        expected = exact(*(tensor.cpu() for tensor in inputs), first_expert=first).to(device)
        assert out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]
        assert relative_error(experts_reference(*inputs, first_expert=first), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("choices_per_expert", [0.1, 4, 16, 40, 56, 57])
def test_every_choice_of_tiles(device, choices_per_expert):
    torch.manual_seed(int(choices_per_expert))
    dtype = DTYPES[1]
    inputs = draw(device, 150, (72, 136, 2, 1), dtype=dtype)
    tiles = choose_tiles(choices_per_expert, dtype)
    out = experts_triton(*inputs, first_expert=0, tiles=tiles)
    assert relative_error(out, experts_reference(*inputs, first_expert=0)) < TOLERANCE[dtype]


def test_groups_of_blocks_cover_all(device):
    torch.manual_seed(5)
    inputs = draw(device, 60, (32, 16, 4, 2))
    expected = experts_reference(*inputs, first_expert=0)
    for group_m in (1, 3, 64):
        tiles = Tiles(16, 16, 32, group_m, 4, 2)
        out = experts_triton(*inputs, first_expert=0, tiles=(tiles, tiles))
        assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("each", [1, 17, 32])
def test_the_grid_has_room_for_blocks_of_a_single_choice(device, each):
    torch.manual_seed(each)
    inputs = draw(device, 3 * each, (32, 16, 3, 1))
    inputs[4].copy_(torch.arange(3 * each)[:, None] % 3)  # every expert's last block but those of 32 holds one
    tiles = Tiles(16, 16, 32, 2, 4, 2)
    out = experts_triton(*inputs, first_expert=0, tiles=(tiles, tiles))
    assert relative_error(out, experts_reference(*inputs, first_expert=0)) < 1e-5


def test_choices_may_be_wide_integers_and_all_fall_on_one_expert(device):
    torch.manual_seed(6)
    inputs = draw(device, 40, (32, 16, 4, 1))
    ids = torch.full_like(inputs[4], 2, dtype=torch.int64)
    out = experts_triton(*inputs[:4], ids, first_expert=0)
    assert relative_error(out, experts_reference(*inputs[:4], ids, first_expert=0)) < 1e-5


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_tokens_whose_experts_are_elsewhere_get_zero(device, num_tokens):
    torch.manual_seed(7)
    *inputs, weights, ids = draw(device, num_tokens, (32, 16, 8, 2), held=3)
    ids[0] = torch.tensor([0, 6], device=device)  # held: 3, 4, 5
    weights[0] = float("nan")
    out = experts_triton(*inputs, weights, ids, first_expert=3, num_experts=8)
    assert (out[0] == 0).all()
    expected = experts_reference(*inputs, weights, ids, first_expert=3)
    assert relative_error(out[1:], expected[1:]) < 1e-5


def test_a_bad_token_spoils_no_other(device):
    torch.manual_seed(8)
    inputs = draw(device, 20, (32, 16, 2, 1))
    expected = experts_triton(*inputs, first_expert=0)
    inputs[0][4] = float("nan")
    out = experts_triton(*inputs, first_expert=0)
    assert out[4].isnan().all()
    assert torch.equal(out[5:], expected[5:])
    assert torch.equal(out[:4], expected[:4])


def test_ranks_that_share_the_experts_add_up(device):
    torch.manual_seed(9)
    x, gate_up, down, *choices = draw(device, 17, (32, 16, 8, 3))
    halves = [
        experts_triton(x, gate_up[held], down[held], *choices, first_expert=held.start, num_experts=len(down))
        for held in (slice(0, 4), slice(4, 8))
    ]
    assert relative_error(sum(halves), experts(x, gate_up, down, *choices, first_expert=0)) < 1e-5


@pytest.mark.parametrize("num_tokens", [7, 600, 4500])  # in one tile; in another size of tile; in two of 8,192
def test_choices_are_sorted_by_expert(device, num_tokens):
    torch.manual_seed(num_tokens)
    ids = torch.randint(0, 5, (num_tokens, 2), device=device, dtype=torch.int32)
    order, starts = _sort(ids, 3, 1)  # held: 1, 2, 3
    each = [torch.where(ids.flatten() == expert)[0] for expert in (1, 2, 3)]
    assert torch.equal(starts.cpu(), torch.tensor([0, *map(len, each)]).cumsum(0).int())
    assert torch.equal(order[: starts[-1]], torch.cat(each).int())


@pytest.mark.skipif(not GPU, reason="real sizes take a GPU")
@pytest.mark.parametrize("size", REAL_SIZES, ids=str)
def test_real_sizes(device, size):
    num_tokens, shape, first, held = size
    torch.manual_seed(num_tokens)
    inputs = draw(device, num_tokens, shape, held=held, dtype=torch.bfloat16)
    out = experts_triton(*inputs, first_expert=first, num_experts=shape[2])
    assert relative_error(out, experts_reference(*inputs, first_expert=first)) < 1e-2


@pytest.mark.skipif(not GPU, reason="graphs take a GPU")
def test_a_graph_follows_its_inputs(device):
    torch.use_deterministic_algorithms(mode=False)
    torch.manual_seed(11)
    inputs = draw(device, 64, QWEN3, dtype=torch.bfloat16)
    scores = torch.randn(64, 128, device=device)

    def run():
        return experts(*inputs[:3], *route(scores, 8, normalised=True), first_expert=0)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for spread in (1, 4):
        scores.normal_().mul_(spread)
        inputs[0].normal_()
        graph.replay()
        weights, ids = route_reference(scores, 8, normalised=True)
        assert relative_error(out, experts_reference(*inputs[:3], weights, ids, first_expert=0)) < 1e-2


def test_a_router_that_cannot_choose_raises(device):
    scores = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="each token chooses 1 to 8 experts, not 9"):
        route(scores, 9, normalised=True)
    with pytest.raises(ValueError, match="each token chooses"):
        route(scores, 0, normalised=True)
    with pytest.raises(ValueError, match="contiguous"):
        route(scores.T, 2, normalised=True)
    with pytest.raises(ValueError, match="contiguous"):
        route(scores[0], 2, normalised=True)
    with pytest.raises(ValueError, match="floating-point"):
        route(scores.long(), 2, normalised=True)
    for places in (torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match=r"slot mapping must be \[4\] of int64"):
            route(scores, 2, normalised=True, slot_mapping_T=places)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[0], "2 dimensions"),
        (0, lambda x: x[:, :-1], "down must be"),
        (0, lambda x: x.half(), "one dtype"),
        (0, lambda x: x.T.contiguous().T, "contiguous"),
        (1, lambda gate_up: gate_up[:-1], "gate_up must be"),
        (1, lambda gate_up: gate_up[:, 1:], "gate_up must be"),
        (2, lambda down: down.mT, "down must be"),
        (3, lambda weights: weights[:, 1:], "need as many choices"),
        (3, lambda weights: weights.double(), "weights are float32"),
        (4, lambda ids: ids[1:], "need as many choices"),
        (4, lambda ids: ids.short(), "int32 or int64"),
    ],
)
def test_inputs_that_do_not_fit_raise(device, place, change, message):
    inputs = [*draw(device, 6, (32, 16, 4, 2))]
    inputs[place] = change(inputs[place])
    with pytest.raises(ValueError, match=message):
        experts(*inputs, first_expert=0)
