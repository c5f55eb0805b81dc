"""Every architecture against transformers in float32, whole, in chunks, step by step, and cut over ranks."""

from __future__ import annotations

import pytest
import torch
from gllm_kernels import few_rows
from gllm_kernels.paged_attention import paged_attention
from runtime import chatglm_reference
from runtime.stepping import Engine, load_stages, on_ranks, random_prompts
from runtime.tiny_models import CHATGLM_CONFIG, NAMES, VOCAB_SIZE, make

from gllm.runtime.attention_batch import AttentionBatch, allocate_caches
from gllm.runtime.model_config import ARCHITECTURES, load_model_config
from gllm.runtime.models import MODELS
from gllm.runtime.shard import Shard

PROMPTS = random_prompts((3, 41, 10), VOCAB_SIZE)
NUM_TOKENS = 64
MAX_LEN = 41 + NUM_TOKENS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Name -> (folder, transformers' model), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, make(name, folder)
        return made[name]

    return get


@torch.inference_mode()
def reference_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def whole_logits(stages, tokens):
    """Logits of every place of one prompt, computed at once."""
    engine = Engine(stages, [tokens], max_len=len(tokens))
    return engine.step([(0, len(tokens))])[0][0]


def pieces_logits(stages, tokens, sizes):
    """The same in pieces of these sizes, and what is left of it token by token."""
    engine = Engine(stages, [tokens], max_len=len(tokens))
    sizes = [*sizes, *[1] * (len(tokens) - sum(sizes))]
    return torch.cat([engine.step([(0, size)])[0][0] for size in sizes])


def assert_is_greedy(model, answers):
    """Each token after the prompt is the likeliest one in transformers' eyes."""
    for prompt, tokens in zip(PROMPTS, answers, strict=True):
        assert len(tokens) == len(prompt) + NUM_TOKENS
        best = reference_logits(model, tokens).argmax(-1).tolist()
        assert best[len(prompt) - 1 : -1] == tokens[len(prompt) :]


def test_every_architecture_has_a_class():
    assert MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_prompt_are_those_of_transformers(name, tiny):
    folder, model = tiny(name)
    prompt = random_prompts([70], VOCAB_SIZE)[0]
    ours, theirs = whole_logits(load_stages(folder), prompt), reference_logits(model, prompt)
    assert theirs.std() > 0.1, "logits say something"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers_for_any_chunk_size(name, tiny):
    folder, model = tiny(name)
    stages = load_stages(folder)
    answers = [
        Engine(stages, PROMPTS, max_len=MAX_LEN, seed=chunk).greedy(NUM_TOKENS, chunk=chunk) for chunk in (64, 7, 1)
    ]
    assert_is_greedy(model, answers[0])
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "qwen2-moe", "glm4"])
def test_few_rows_have_kernels_of_their_own_and_the_same_logits(name, tiny, monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    pytest.importorskip("kernels.interpreter").let_scalars_bound_loops()
    launched = []
    monkeypatch.setattr(few_rows, "runs_triton", lambda _: True)
    monkeypatch.setattr(few_rows, "_DTYPES", {torch.float32})
    monkeypatch.setattr(few_rows, "MIN_TILED", 1)
    monkeypatch.setattr(few_rows, "linear_triton", recorded(few_rows.linear_triton, launched))
    folder, model = tiny(name)
    prompt = random_prompts([20], VOCAB_SIZE)[0]
    logits = pieces_logits(load_stages(folder), prompt, (16, 3))
    torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=0)
    has_post_norms = load_model_config(folder).post_norms
    assert {num_rows for num_rows, _ in launched} == {16, 3, 1}
    assert any("residual_MO" in options for _, options in launched) != has_post_norms


def recorded(function, calls):
    """That function, which notes the rows of each call and what stands around the product."""

    def call(x, *rest, **options):
        calls.append((len(x), {name for name, value in options.items() if value is not None}))
        return function(x, *rest, **options)

    return call


# (name, tp, ep): KV heads cut, KV heads repeated, a vocabulary the ranks do not divide, experts spread and cut.
CUTS = [
    *((name, 2, 1) for name in NAMES),
    ("llama-biased", 4, 1),
    ("glm4", 4, 1),
    ("chatglm", 4, 1),
    ("qwen3-moe", 2, 2),
    ("qwen3-moe", 4, 2),
    ("qwen2-moe", 2, 2),
    ("mixtral", 4, 4),
]


@pytest.mark.parametrize(("name", "tp", "ep"), CUTS)
def test_ranks_of_a_stage_give_what_one_gives(name, tp, ep, tiny):
    folder, _ = tiny(name)
    alone = load_stages(folder)
    expected = Engine(alone, PROMPTS, max_len=MAX_LEN).greedy(24, chunk=16)

    whole = whole_logits(load_stages(folder, dtype=torch.float64), PROMPTS[1])

    def rank(group):
        precise = load_stages(folder, group=group, ep=ep, dtype=torch.float64)
        stages = load_stages(folder, group=group, ep=ep)
        return whole_logits(precise, PROMPTS[1]), Engine(stages, PROMPTS, max_len=MAX_LEN).greedy(24, chunk=16)

    # In float64, so that no processor's way to add up comes near the bound.
    for logits, tokens in on_ranks(tp, rank):
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
        assert tokens == expected


@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-moe", "glm4"])
def test_stages_give_what_one_gives(name, pp, tiny):
    folder, _ = tiny(name)
    whole, stages = load_stages(folder), load_stages(folder, pp=pp)
    assert torch.equal(whole_logits(stages, PROMPTS[1]), whole_logits(whole, PROMPTS[1]))
    assert [len(stage.layers) for stage in stages] == ([1, 2] if pp == 2 else [1, 1, 1])


def test_tensor_parallel_pipeline_with_a_tied_head(tiny):
    folder, model = tiny("qwen2")

    def rank(group):
        stages = load_stages(folder, group=group, pp=3)
        return Engine(stages, PROMPTS, max_len=MAX_LEN).greedy(NUM_TOKENS, chunk=7)

    for answers in on_ranks(2, rank):
        assert_is_greedy(model, answers)


def test_bfloat16_is_close_to_float32(tiny):
    folder, model = tiny("qwen3")
    (stage,) = load_stages(folder)
    low = type(stage)(stage.config, stage.shard, dtype=torch.bfloat16)
    for mine, other in zip(low.parameters(), stage.parameters(), strict=True):
        mine.copy_(other)
    logits = whole_logits([low], PROMPTS[1])
    assert logits.dtype == torch.bfloat16, "what draws reads them as they are: a copy would take longer than the draw"
    error = (logits.float() - reference_logits(model, PROMPTS[1])).norm() / logits.float().norm()
    assert error < 0.05


def test_chatglm_is_also_what_its_own_layout_says(tiny):
    folder, model = tiny("chatglm")
    expected = chatglm_reference.logits(folder, CHATGLM_CONFIG, PROMPTS[1])
    torch.testing.assert_close(whole_logits(load_stages(folder), PROMPTS[1]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_logits(model, PROMPTS[1]), expected, atol=1e-4, rtol=0)


def test_padding_rows_of_a_batch_stay_finite():
    """A batch padded with sequences of no keys (as CUDA graphs need) gives numbers for them too."""
    query, cache = torch.randn(2, 4, 8), torch.randn(3, 4, 2, 8)
    out = paged_attention(
        query,
        cache,
        cache,
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        kv_lens_S=torch.tensor([5, 0], dtype=torch.int32),
        block_tables_SB=torch.tensor([[1, 2], [0, 0]], dtype=torch.int32),
        num_decodes=2,
        max_query_len=1,
        max_kv_len=5,
        scale=1.0,
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "glm4", "chatglm"])
def test_a_decode_step_neither_needs_the_host_nor_a_certain_device(name, tiny):
    """On the device that stores nothing, whatever asked for a value or made a tensor elsewhere would raise."""
    config = load_model_config(tiny(name)[0])
    shard = Shard(layers=range(config.shape.num_layers))
    stage = MODELS[config.architecture](config, shard, device="meta")
    caches = allocate_caches(config, shard, num_blocks=8, block_size=4, dtype=stage.dtype, device=stage.device)
    ints = {"dtype": torch.int32, "device": "meta"}
    batch = AttentionBatch(
        positions_T=torch.zeros(3, dtype=torch.int64, device="meta"),
        slot_mapping_T=torch.zeros(3, dtype=torch.int64, device="meta"),
        query_starts=torch.zeros(4, **ints),
        kv_lens_S=torch.zeros(3, **ints),
        block_tables_SB=torch.zeros(3, 2, **ints),
        num_decodes=3,
        max_query_len=1,
        max_kv_len=7,
    )
    x = stage.embed(torch.zeros(3, dtype=torch.int64, device="meta"))
    logits = stage.logits(stage(x, batch, caches))
    assert logits.shape == (3, VOCAB_SIZE)
    assert (logits.device.type, logits.dtype) == ("meta", stage.dtype)


def test_a_tied_matrix_is_held_once_where_one_rank_has_both_ends(tiny):
    (whole,) = load_stages(tiny("llama-tied")[0])
    assert whole.head is whole.embedding
    (untied,) = load_stages(tiny("llama")[0])
    assert untied.head is not untied.embedding
