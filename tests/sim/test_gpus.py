"""Data sheets and the ways to spread a model over GPUs."""

import random
from itertools import combinations, pairwise

import pytest

from gllm.model_shape import load_shape, shape_of_config
from gllm.parallel import Parallel, Stage, _balanced
from gllm.sim.gpus import GPUS, get_gpu

TINY = shape_of_config(
    {
        "hidden_size": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    },
    name="tiny",
)


def test_names_and_units():
    assert set(GPUS) == {"h200", "h100", "a100-40g", "a100-80g", "a800", "l20", "l40s", "l4", "b200", "rtx-4090"}
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.source.startswith("NVIDIA")
        assert 20 * 2**30 < gpu.memory_bytes < 200 * 10**9
        assert 3e11 <= gpu.bandwidth_bytes_per_s <= 8e12
        assert 1e14 < gpu.bf16_flop_per_s < 3e15
        assert 32e9 <= gpu.link_bytes_per_s <= 900e9


def test_h200_is_what_its_driver_reports():
    h200 = get_gpu("H200")
    assert h200.memory_bytes == 143_771 * 2**20
    assert (h200.all_reduce_latency_ns, h200.send_latency_ns) == (4_400, 40_000)


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tpu'.*a100-40g.*rtx-4090"):
        get_gpu("tpu")


@pytest.mark.parametrize(
    ("pp", "counts"), [(1, (6,)), (2, (3, 3)), (4, (2, 2, 1, 1)), (5, (2, 1, 1, 1, 1)), (6, (1,) * 6)]
)
def test_where_the_head_is_small_layers_are_dealt_evenly_and_the_first_stages_take_the_rest(pp, counts):
    parallel = Parallel(pp=pp)
    assert parallel.layers_per_stage(TINY) == counts
    assert [layer for stage in range(pp) for layer in parallel.layers_of_stage(TINY, stage)] == list(range(6))


@pytest.mark.parametrize(
    ("name", "pp", "counts"),
    [
        ("qwen3-32b", 4, (16, 16, 16, 16)),
        ("qwen3-8b", 4, (10, 9, 9, 8)),
        ("qwen3-0.6b", 4, (8, 7, 7, 6)),
        ("qwen3-30b-a3b", 4, (12, 12, 12, 12)),
        ("qwen2.5-3b", 8, (5, 5, 5, 5, 5, 4, 4, 3)),
        ("llama-3.2-1b", 16, (1,) * 16),
    ],
)
def test_the_stage_with_the_head_has_fewer_layers(name, pp, counts):
    assert Parallel(pp=pp).layers_per_stage(load_shape(name)) == counts


def test_a_split_is_the_best_of_all():
    """Of layers of two kinds; the slowest stage counts, then the second slowest, then many layers first."""
    lots = random.Random(0)
    for _ in range(40):
        costs = tuple(lots.choice((3, 10)) for _ in range(lots.randint(4, 9)))
        head, pp = lots.randint(0, 25), lots.randint(1, 4)

        def rank(cuts, costs=costs, head=head):
            ends = (0, *cuts, len(costs))
            parts = [sum(costs[a:b]) for a, b in pairwise(ends)]
            parts[-1] += head
            return sorted(parts, reverse=True), [a - b for a, b in pairwise(ends)]

        best = min(rank(cuts) for cuts in combinations(range(1, len(costs)), pp - 1))
        assert list(_balanced(costs, head, pp)) == [-count for count in best[1]]


def test_uneven_layers():
    parallel = Parallel(pp=3, pp_layers=(1, 3, 2))
    parallel.check(TINY)
    assert parallel.layers_of_stage(TINY, 1) == range(1, 4)
    assert [stage.num_layers for stage in parallel.stages(TINY)] == [1, 3, 2]


def test_stages_count_expert_layers():
    config = {"num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
    sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 16}
    shape = shape_of_config({**sizes, **config, "vocab_size": 32, "max_position_embeddings": 64}, name="tiny")
    assert Parallel(pp=4).stages(shape) == (
        Stage(num_dense=2, num_moe=0, is_first=True, is_last=False),
        Stage(num_dense=0, num_moe=2, is_first=False, is_last=False),
        Stage(num_dense=0, num_moe=1, is_first=False, is_last=False),
        Stage(num_dense=0, num_moe=1, is_first=False, is_last=True),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 0}, "--pp is 0"),
        ({"tp": -1}, "--tp is -1"),
        ({"tp": 2, "ep": 4}, "--ep 4 does not divide --tp 2"),
        ({"pp": 2, "pp_layers": (6,)}, "--pp-layers"),
        ({"pp": 2, "pp_layers": (6, 0)}, "--pp-layers"),
    ],
)
def test_options_that_are_wrong_for_any_model(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 7}, "more than the 6 layers"),
        ({"tp": 3}, "attention heads"),
        ({"pp": 2, "pp_layers": (2, 3)}, "add up to 5"),
        ({"tp": 2, "ep": 2}, "no experts"),
    ],
)
def test_options_that_are_wrong_for_this_model(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**options).check(TINY)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen1.5-moe-a2.7b", {"tp": 8, "ep": 8}, "60 experts"),
        ("qwen3-30b-a3b", {"tp": 32}, None),
        ("glm-4-9b", {"tp": 32}, None),
        ("qwen2.5-3b", {"tp": 16}, None),
        ("qwen2.5-0.5b", {"tp": 7}, "KV heads"),
        ("llama-3.2-3b", {"tp": 24}, "intermediate_size"),
    ],
)
def test_real_models(name, options, message):
    if message is None:
        Parallel(**options).check(load_shape(name))
    else:
        with pytest.raises(ValueError, match=message):
            Parallel(**options).check(load_shape(name))


def test_kv_heads_are_repeated_when_ranks_are_more():
    assert [Parallel(tp=tp).kv_heads_per_rank(TINY) for tp in (1, 2, 4)] == [2, 1, 1]
    assert Parallel().attention_params_per_rank(TINY) == TINY.attention_params
    assert Parallel(tp=4).attention_params_per_rank(TINY) * 4 > TINY.attention_params
