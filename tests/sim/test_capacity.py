"""Room for KV cache blocks: by hand, in order, and what a user is told when there is none."""

from dataclasses import replace

import pytest

from gllm.model_shape import list_shapes, load_shape, shape_of_config
from gllm.parallel import Parallel
from gllm.sim.capacity import activation_bytes, block_bytes, kv_capacity, weight_bytes
from gllm.sim.gpus import get_gpu

H200 = get_gpu("h200")
CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
TINY = shape_of_config(CONFIG, name="tiny")
MIB = 2**20


def blocks(name="qwen3-8b", gpu=H200, parallel=None, **options):
    return kv_capacity(load_shape(name), gpu, parallel or Parallel(), **{"max_batch_tokens": 2048, **options})


def stage_weights(shape, parallel):
    return [weight_bytes(shape, parallel, stage) for stage in parallel.stages(shape)]


def test_by_hand():
    parallel = Parallel(pp=2)
    first, last = stage_weights(TINY, parallel)
    layer = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 + 16
    assert (first, last) == (2 * (2 * layer + 256), 2 * (layer + 256))
    assert activation_bytes(TINY, parallel, 10, is_last=False) == 10 * (4 * 8 + 48) * 2
    assert activation_bytes(TINY, parallel, 10, is_last=True) == 1600 + 2 * 4 * 32 * 10
    stage = parallel.stages(TINY)[0]
    assert block_bytes(TINY, parallel, stage, block_size=16, kv_dtype_bytes=2) == 2 * 2 * 2 * 2 * 16 * 2
    gpu = replace(H200, memory_bytes=4096 * MIB)
    room = (4096 - 600 - 1024 - 400) * MIB
    got = kv_capacity(TINY, gpu, parallel, memory_utilization=1.0, max_batch_tokens=10)
    assert got == min((room - first - 1600) // 512, (room - last - 1600 - 2560) // 256)


@pytest.mark.parametrize("name", list_shapes())
def test_weights_of_one_gpu_are_the_model(name):
    shape = load_shape(name)
    (whole,) = stage_weights(shape, Parallel())
    assert whole == pytest.approx(shape.total_params * shape.dtype_bytes, rel=1e-3)


def test_weights_of_all_gpus_add_up():
    shape = load_shape("qwen3-30b-a3b")
    for parallel in (Parallel(pp=4), Parallel(tp=4), Parallel(pp=2, tp=2, ep=2)):
        total = sum(stage_weights(shape, parallel)) * parallel.tp
        assert total == pytest.approx(shape.total_params * 2, rel=2e-3)  # norms and routers are whole on each


def test_a_tied_head_is_held_twice_only_if_stages_are_two():
    shape = load_shape("qwen3-0.6b")
    assert sum(stage_weights(shape, Parallel(pp=2))) - sum(stage_weights(shape, Parallel())) == pytest.approx(
        shape.embedding_params * 2, rel=1e-3
    )


def test_plausible_on_h200():
    assert 750_000 < blocks() * 16 < 850_000  # 126 GiB less 15 of weights and 3 of the rest, 144 KiB a token
    assert blocks("qwen3-32b", parallel=Parallel(pp=4)) > 3 * blocks("qwen3-32b")


def test_monotone():
    assert blocks(memory_utilization=0.8) < blocks(memory_utilization=0.9) < blocks(memory_utilization=1.0)
    assert blocks(max_batch_tokens=8192) < blocks(max_batch_tokens=2048)
    assert blocks(block_size=32) == pytest.approx(blocks() / 2, rel=1e-4)
    assert blocks(kv_dtype_bytes=1) == pytest.approx(blocks() * 2, rel=1e-4)
    assert blocks(parallel=Parallel(pp=2)) > blocks() < blocks(parallel=Parallel(tp=2))
    assert blocks(gpu=get_gpu("h100")) < blocks()


def test_more_ranks_than_kv_heads_repeat_them():
    few, many = (blocks("qwen3-30b-a3b", parallel=Parallel(tp=tp)) for tp in (4, 8))
    assert few < many < few * 1.2  # the same KV on each rank, a little more room


def test_the_fullest_stage_decides():
    even, uneven = Parallel(pp=2), Parallel(pp=2, pp_layers=(26, 10))
    assert blocks(parallel=uneven) < blocks(parallel=even)


def test_a_model_that_does_not_fit_says_so_with_numbers():
    with pytest.raises(
        ValueError, match=r"qwen3-32b needs \d+\.\d GiB .* rtx-4090 has \d+\.\d GiB .*--pp or --tp"
    ) as error:
        blocks("qwen3-32b", gpu=get_gpu("rtx-4090"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"memory_utilization": 0.0}, {"memory_utilization": 1.5}, {"block_size": 0}, {"max_batch_tokens": 0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        blocks(**options)


def test_a_split_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match="--tp 3"):
        blocks(parallel=Parallel(tp=3))
