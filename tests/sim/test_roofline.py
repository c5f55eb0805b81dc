"""The roofline: numbers by hand, order between works, and the split into components."""

import pickle
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.costs import FixedCost

from gllm.graph_sizes import MAX_TOKENS, graph_sizes, token_graph_sizes
from gllm.model_shape import load_shape, shape_of_config
from gllm.parallel import Parallel
from gllm.sim.constants import RooflineConstants
from gllm.sim.cost import COMPONENTS, L2_RATE, BatchWork, ChunkWork, batch_work, kept_tokens, tokens_from_memory
from gllm.sim.gpus import Gpu, get_gpu
from gllm.sim.roofline import Roofline, missed_expert_table

H200 = get_gpu("h200")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
TINY = shape_of_config(CONFIG, name="tiny")
MOE = shape_of_config(
    {**CONFIG, "num_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    name="tiny-moe",
)
# One byte and one operation a nanosecond: times are counts.
SLOW = Gpu(
    name="slow",
    memory_bytes=2**30,
    l2_bytes=64 * 1000,
    bandwidth_bytes_per_s=10**9,
    bf16_flop_per_s=10**9,
    link_bytes_per_s=10**9,
    all_reduce_latency_ns=1000,
    send_latency_ns=500,
    source="made up",
)
IDEAL = RooflineConstants(
    memory_efficiency=1.0,
    gemm_efficiency=1.0,
    prefill_attention_efficiency=1.0,
    decode_attention_efficiency=1.0,
    all_reduce_efficiency=1.0,
    send_efficiency=1.0,
    kernel_gap_ns=0,
    launch_ns=0,
)


def tiny(parallel=None, **constants):
    return Roofline(shape=TINY, gpu=SLOW, parallel=parallel or Parallel(), constants=replace(IDEAL, **constants))


def ideal(shape, **options):
    return Roofline(shape=shape, gpu=SLOW, parallel=Parallel(**options), constants=IDEAL)


# --- by hand ---------------------------------------------------------------------------------------------------


def projection(inputs, outputs, tokens):
    """With 16-bit numbers: 2 operations a weight and token, or 2 bytes a weight, input and output."""
    return max(2 * inputs * outputs * tokens, 2 * (inputs * outputs + (inputs + outputs) * tokens))


def layer_gemm(tokens, tp=1, kv_heads=2):
    query, mlp = 8 // tp, 16 // tp
    attention = projection(8, query + 2 * kv_heads * 2, tokens) + projection(query, 8, tokens)
    return attention + projection(8, 2 * mlp, tokens) + 2 * 3 * mlp * tokens + projection(mlp, 8, tokens)


@pytest.mark.parametrize("tokens", [1, 2, 8, 64])
def test_decode_by_hand(tokens):
    parts = tiny().components(batch_work(contexts=[5] * tokens))
    assert parts["gemm"] == [4 * layer_gemm(tokens)]
    assert parts["decode_attention"] == [4 * (2 * 2 * 2 * 2 * 5 * tokens + 2 * 2 * 8 * tokens)]
    assert parts["head"] == [projection(8, 32, tokens) + 3.5 * 2 * 32 * tokens]
    elements = 2 * (8 * 8 + 2 * (8 + 8)) * tokens
    assert parts["other"] == [4 * elements + 2 * 2 * 8 * tokens]
    assert parts["prefill_attention"] == parts["all_reduce"] == parts["launch"] == [0]


def test_prefill_attention_by_hand():
    long = batch_work(chunks=[(0, 64)])
    assert long == BatchWork(
        chunks=(ChunkWork(0, 64),), num_prefill_tokens=64, prefill_pairs=2080, prefill_context=64, num_sampled=1
    )
    assert tiny().components(long)["prefill_attention"] == [4 * 4 * 8 * 2080]
    # A short chunk far into its prompt reads more than it computes on a GPU with little bandwidth.
    chunk = batch_work(chunks=[(1000, 1)])
    slow_memory = Roofline(shape=TINY, gpu=replace(SLOW, bandwidth_bytes_per_s=10**8), constants=IDEAL)
    assert slow_memory.components(chunk)["prefill_attention"] == pytest.approx([4 * 10 * (16 * 1001 + 32)])


def test_keys_in_common_come_from_memory_once():
    alone, shared = batch_work(contexts=[100] * 3), replace(batch_work(contexts=[100] * 3), decode_repeats=160)
    assert tokens_from_memory(alone, 1000) == 300
    # What comes from the L2 cache takes its time, too.
    assert tokens_from_memory(replace(shared, common_context=80), 1000) == 300 / L2_RATE == 200
    assert tokens_from_memory(replace(shared, common_context=80, decode_repeats=60), 1000) == 300 - 60
    # Of 80 tokens the cache keeps 20: three quarters are gone before the next sequence asks.
    assert tokens_from_memory(replace(shared, common_context=80), 20) == 300 - 40
    # A token has 2 * 2 heads of 2 channels in 2 bytes; half of 64,000 bytes are 2,000 of them.
    assert kept_tokens(TINY, SLOW, Parallel()) == 2000
    some, all_gone = (replace(shared, common_context=num) for num in (80, 4000))
    attention = [tiny().components(work)["decode_attention"][0] for work in (alone, some, all_gone)]
    assert attention == [4 * (16 * keys + 3 * 32) for keys in (300, 200, 220)]
    assert tiny().stage_ns(alone)[0] - tiny().stage_ns(some)[0] == 4 * 16 * 100


def test_batch_work_sums_chunks_and_decodes():
    work = batch_work(chunks=[(3, 2), (0, 4)], contexts=[7, 9], num_sampled=3)
    assert work == BatchWork(
        chunks=(ChunkWork(3, 2), ChunkWork(0, 4)),
        num_prefill_tokens=6,
        num_decode_tokens=2,
        prefill_pairs=(4 + 5) + (1 + 2 + 3 + 4),
        prefill_context=9,
        decode_context=16,
        num_sampled=3,
    )


def test_tensor_slices_by_hand():
    parts = ideal(TINY, tp=4).components(batch_work(contexts=[5] * 8))
    assert parts["gemm"] == [4 * layer_gemm(8, tp=4, kv_heads=1)]  # two KV heads, repeated to four
    assert parts["all_reduce"] == [(2 * 4 + 1) * (1000 + 1.5 * 8 * 16)]
    gather = 1000 + 8 * 32 * 2 * 3 / 4
    assert parts["head"] == [projection(8, 8, 8) + 3.5 * 2 * 32 * 8 + gather]  # all of the logits are drawn from


def test_pipeline_stages_by_hand():
    work = batch_work(contexts=[5] * 8)
    whole, split = tiny().components(work), tiny(Parallel(pp=4)).components(work)
    for name in COMPONENTS:
        assert sum(split[name]) == pytest.approx(whole[name][0])
    assert split["gemm"] == [layer_gemm(8)] * 4
    assert split["head"][:3] == [0, 0, 0]
    assert tiny().transfer_ns(work) == 0
    assert tiny(Parallel(pp=2)).transfer_ns(work) == 500 + 8 * 16


def test_uneven_layers_cost_in_proportion():
    parts = tiny(Parallel(pp=2, pp_layers=(3, 1))).components(batch_work(chunks=[(0, 32)], contexts=[9]))
    for name in ("gemm", "prefill_attention", "decode_attention"):
        assert parts[name][0] == pytest.approx(3 * parts[name][1])


# --- graphs and launches ---------------------------------------------------------------------------------------


def test_decodes_are_padded_to_the_graph_and_larger_batches_are_not():
    def gemm(count, size):
        return tiny(max_graph_size=size).components(batch_work(contexts=[1] * count))["gemm"][0]

    assert gemm(9, 512) == 4 * layer_gemm(16)
    assert gemm(17, 16) == 4 * layer_gemm(17)
    assert gemm(9, 12) == 4 * layer_gemm(12)  # no graph is larger than the largest
    assert gemm(3, 0) == 4 * layer_gemm(3)


def layers_ns(parts):
    return sum(part[0] for name, part in parts.items() if name != "head")


@pytest.mark.parametrize("tokens", [2, 16, 17, 130, 8191, 8192])
def test_a_short_step_with_chunks_is_a_graph_of_the_next_size(tokens):
    size = next(size for size in token_graph_sizes(MAX_TOKENS, TINY) if size >= tokens)
    step, padded = (batch_work(chunks=[(7, num - 1)], contexts=[5]) for num in (tokens, size))
    model = tiny(launch_ns=10**9)
    parts, expected = model.components(step), model.components(padded)
    assert parts["gemm"] == [4 * layer_gemm(size)]
    for name in ("gemm", "other", "head", "launch", "decode_attention"):
        assert parts[name] == expected[name]
    assert parts["launch"] == [0]
    assert parts["prefill_attention"] == [
        4 * max(4 * 8 * step.prefill_pairs, 16 * step.prefill_context + 32 * (tokens - 1))
    ]
    assert model.stage_ns(step) == tiny().stage_ns(step) == [pytest.approx(sum(part[0] for part in parts.values()))]


def test_the_host_bounds_what_is_not_a_graph():
    model, largest = tiny(launch_ns=10**9), token_graph_sizes(MAX_TOKENS, TINY)[-1]
    for beyond in (batch_work(chunks=[(0, largest)], contexts=[1]), batch_work(contexts=[1] * 513)):
        parts = model.components(beyond)
        assert parts["gemm"] == [4 * layer_gemm(beyond.num_prefill_tokens + beyond.num_decode_tokens)]
        assert layers_ns(parts) == pytest.approx(4 * 9 * 10**9)
        assert model.stage_ns(beyond)[0] == pytest.approx(layers_ns(parts) + parts["head"][0])
    # A GPU that takes longer than its host does not wait for it.
    quick = tiny(launch_ns=10).components(beyond)
    assert quick["launch"] == [0]
    assert quick["gemm"] == parts["gemm"]


def test_without_graphs_the_host_bounds_every_step():
    model = tiny(launch_ns=10**9, max_graph_size=0)
    for step in (batch_work(contexts=[1]), batch_work(chunks=[(0, 9)], contexts=[1])):
        parts = model.components(step)
        assert parts["gemm"] == [4 * layer_gemm(step.num_prefill_tokens + step.num_decode_tokens)]
        assert layers_ns(parts) == pytest.approx(4 * 9 * 10**9)
        assert model.stage_ns(step)[0] == pytest.approx(layers_ns(parts) + parts["head"][0])


@pytest.mark.parametrize(("name", "tp"), [("qwen3-8b", 1), ("qwen3-8b", 2), ("qwen3-32b", 4), ("qwen3-30b-a3b", 2)])
def test_steps_are_padded_to_the_sizes_that_are_captured(name, tp):
    """Of this shape and these slices, to the last one; and nothing longer is a graph."""
    shape, constants = load_shape(name), RooflineConstants(launch_ns=10**9)
    model = Roofline(shape=shape, gpu=H200, parallel=Parallel(tp=tp), constants=constants)

    def products_and_launch(work):
        parts = model.components(work)
        return parts["gemm"][0], parts["launch"][0]

    def check(sizes, step):
        before_ns = 0
        for first, size in pairwise([0, *sizes]):
            size_ns, launch_ns = products_and_launch(step(size))
            least_ns, least_launch_ns = products_and_launch(step(first + 1))
            assert launch_ns == least_launch_ns == 0
            assert before_ns < least_ns <= size_ns
            assert (least_ns == size_ns) is (first + 1 == size or not shape.is_moe)
            before_ns = size_ns
        assert products_and_launch(step(sizes[-1] + 1))[1] > 0

    check(token_graph_sizes(MAX_TOKENS, shape, tp), lambda num: batch_work(chunks=[(0, num)]))
    check(graph_sizes(constants.max_graph_size), lambda num: batch_work(contexts=[1] * num))


def test_an_all_reduce_is_launched_like_a_kernel_and_has_its_gap_in_its_latency():
    work = batch_work(contexts=[5] * 8)
    plain, slow = (tiny(Parallel(tp=4), kernel_gap_ns=gap).components(work) for gap in (0, 10))
    assert slow["other"][0] - plain["other"][0] == 4 * 9 * 10
    assert slow["all_reduce"] == plain["all_reduce"]
    parts = tiny(Parallel(tp=4), launch_ns=10**9, max_graph_size=0).components(work)
    assert layers_ns(parts) == pytest.approx(4 * (9 + 2) * 10**9)


# --- experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "each"), [(8, 2), (128, 8), (4, 4)])
def test_missed_experts_against_exact_fractions(experts, each):
    table = missed_expert_table(experts, each)
    exact = Fraction(experts - each, experts)
    for tokens in (0, 1, 2, 5):
        value = table[tokens] if tokens < len(table) else 0.0
        assert value == pytest.approx(float(exact**tokens), abs=1e-12)
    assert table[-1] <= 1e-12


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (3, 4), (4, 4), (9, 16)])
def test_expert_layers_by_hand(tokens, size):
    """Padding to the size of a graph visits the router and the shared expert, and no other."""
    parts = ideal(MOE).components(batch_work(contexts=[5] * tokens))
    attention = projection(8, 16, size) + projection(8, 8, size)
    mlp = projection(8, 32, size) + 2 * 3 * 16 * size + projection(16, 8, size)
    weights = 2 * 3 * 8 * 16 * 8 * (1 - Fraction(3, 4) ** tokens)  # each token reads two of eight experts
    rows = 2 * tokens * (2 * (8 + 32) + 2 * 48 + 2 * 24)
    expert = max(2 * 3 * 8 * 16 * 2 * tokens, float(weights) + rows)
    router = projection(8, 8, size)
    assert parts["gemm"] == pytest.approx([4 * attention + mlp + 3 * (expert + router + mlp)])


def test_more_tokens_read_more_experts_until_all_are_read():
    model = Roofline(shape=load_shape("qwen3-30b-a3b"), gpu=H200)
    gemm = [model.components(batch_work(contexts=[1] * n))["gemm"][0] for n in (1, 8, 64, 512)]
    weights_ns = 48 * 128 * 3 * 2048 * 768 * 2 / (4800 * 0.9)
    assert gemm[0] < 0.2 * weights_ns
    assert gemm[1] < 0.7 * weights_ns
    assert gemm[2] > 0.98 * weights_ns
    assert gemm[3] > gemm[2]


def test_spreading_experts_waits_for_the_fullest_rank():
    work = batch_work(chunks=[(0, 64)])
    sliced, spread = (ideal(MOE, tp=4, ep=ep).components(work)["gemm"][0] for ep in (1, 4))
    assert sliced < spread < 2 * sliced


# --- order -----------------------------------------------------------------------------------------------------

MODELS = [
    ideal(TINY, pp=4),
    ideal(MOE, pp=2, tp=2, ep=2),
    Roofline(shape=load_shape("qwen3-8b"), gpu=H200, parallel=Parallel(pp=4)),
    Roofline(shape=load_shape("qwen3-30b-a3b"), gpu=get_gpu("l20"), parallel=Parallel(tp=4, ep=4)),
]
models = st.sampled_from(MODELS)
chunk_lists = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 2000)), min_size=1, max_size=6)
context_lists = st.lists(st.integers(1, 8000), max_size=40)


def never_cheaper(model, less, more):
    return all(a <= b for a, b in zip(model.stage_ns(less), model.stage_ns(more), strict=True))


@given(model=models, chunks=chunk_lists, contexts=context_lists, chunk=chunk_lists, context=context_lists)
@settings(max_examples=150, deadline=None)
def test_more_work_is_never_cheaper(model, chunks, contexts, chunk, context):
    less = batch_work(chunks=chunks, contexts=contexts)
    more = batch_work(chunks=chunks + chunk, contexts=contexts + context)
    assert never_cheaper(model, less, more)
    assert model.transfer_ns(less) <= model.transfer_ns(more)


@given(model=models, count=st.integers(1, 700), extra=st.integers(0, 700), context=st.integers(1, 4000))
@settings(max_examples=150, deadline=None)
def test_more_decodes_are_never_cheaper(model, count, extra, context):
    less, more = (batch_work(contexts=[context] * n) for n in (count, count + extra))
    assert never_cheaper(model, less, more)


@given(model=models, chunks=chunk_lists | st.just([]), contexts=context_lists, sampled=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_components_add_up_to_the_stage(model, chunks, contexts, sampled):
    work = batch_work(chunks=chunks, contexts=contexts or [1], num_sampled=sampled)
    parts = model.components(work)
    assert tuple(parts) == COMPONENTS
    for stage, whole in enumerate(model.stage_ns(work)):
        assert sum(part[stage] for part in parts.values()) == pytest.approx(whole, abs=1.01, rel=1e-9)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_more_gpus_shrink_a_large_prefill(tp):
    shape, work = load_shape("qwen3-32b"), batch_work(chunks=[(0, 2048)])
    one = Roofline(shape=shape, gpu=H200).components(work)
    many = Roofline(shape=shape, gpu=H200, parallel=Parallel(tp=tp)).components(work)
    assert many["gemm"][0] == pytest.approx(one["gemm"][0] / tp, rel=0.02)
    assert many["prefill_attention"][0] == pytest.approx(one["prefill_attention"][0] / tp)
    assert many["all_reduce"][0] > one["all_reduce"][0] == 0


# --- what users see --------------------------------------------------------------------------------------------


def test_plausible_times_on_h200():
    def ms(name, work, **options):
        return [
            ns / 1e6 for ns in Roofline(shape=load_shape(name), gpu=H200, parallel=Parallel(**options)).stage_ns(work)
        ]

    assert ms("qwen3-8b", batch_work(contexts=[1000])) == pytest.approx([4.9], rel=0.05)  # measured: 4.40
    # 31.2e9 weights, two operations each, 2048 tokens, four stages, 771 TFLOP/s: 41.4 ms; attention 3.5, norms and
    # activations 2.1, gaps 0.6
    even = {"pp": 4, "pp_layers": (16, 16, 16, 16)}
    assert ms("qwen3-32b", batch_work(chunks=[(0, 2048)]), **even) == pytest.approx([47.6] * 4, rel=0.02)
    # 37.7 GB of KV at 4.1 TB/s, 3.9 TFLOP of products at 770 TFLOP/s and 330 kernels; measured: 16.1
    assert ms("qwen3-8b", batch_work(contexts=[1000] * 256)) == pytest.approx([16.1], rel=0.05)


def test_times_are_integers_and_equal_in_any_process():
    code = (
        "from gllm.model_shape import load_shape; from gllm.sim.gpus import get_gpu;"
        "from gllm.parallel import Parallel; from gllm.sim.roofline import Roofline;"
        "import sys; from gllm.sim.cost import batch_work;"
        "m = Roofline(shape=load_shape('qwen3-30b-a3b'), gpu=get_gpu('h200'), parallel=Parallel(pp=4, tp=2, ep=2));"
        "print([list(m.stage_ns(batch_work(chunks=[(7, n)], contexts=[n] * n))) for n in (1, 33, 600)]);"
        "sys.exit(bool({'numpy', 'torch', 'simpy'} & set(sys.modules)))"
    )
    outs = {
        subprocess.run(  # noqa: S603 - our own code
            [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1")
    }
    model = Roofline(shape=load_shape("qwen3-30b-a3b"), gpu=H200, parallel=Parallel(pp=4, tp=2, ep=2))
    here = [list(model.stage_ns(batch_work(chunks=[(7, n)], contexts=[n] * n))) for n in (1, 33, 600)]
    assert outs == {f"{here}\n".encode()}
    assert all(type(ns) is int for row in here for ns in row)


def test_order_of_questions_does_not_matter():
    works = [batch_work(contexts=[n] * n) for n in range(1, 40)]
    forward, backward = ideal(MOE, pp=2), ideal(MOE, pp=2)
    assert [forward.stage_ns(w) for w in works] == [backward.stage_ns(w) for w in works[::-1]][::-1]


def test_a_model_survives_pickling():
    model, work = ideal(MOE, pp=4, tp=2, ep=2), batch_work(chunks=[(0, 9)], contexts=[4])
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert (copy.stage_ns(work), copy.host_ns) == (model.stage_ns(work), model.host_ns)


def test_a_split_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match="no experts"):
        ideal(TINY, tp=2, ep=2)


def test_fixed_cost():
    model, work = FixedCost(num_stages=2, batch_ns=10, token_ns=3, hop_ns=5), batch_work(chunks=[(0, 2)], contexts=[4])
    assert model.stage_ns(work) == (19, 19)
    assert model.transfer_ns(work) == 5
    assert FixedCost(hop_ns=5).transfer_ns(work) == 0
    assert {name: sum(part) for name, part in model.components(work).items() if sum(part)} == {"gemm": 38}
