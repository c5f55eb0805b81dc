"""Shapes against the counts their makers publish, and the errors a user can meet."""

import json
import subprocess
import sys

import pytest

from gllm.model_shape import list_shapes, load_shape, shape_of_config

# The "total" of each repository's safetensors index on huggingface.co; of the two smallest Qwen3, whose files
# store the tied head a second time, the count without it.
PUBLISHED = {
    "deepseek-coder-6.7b": 6_740_512_768,
    "glm-4-9b": 9_399_951_392,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
MOE = {**LLAMA, "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}


def test_every_named_shape_has_a_published_count():
    assert list_shapes() == tuple(sorted(PUBLISHED))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_total_params_match_the_published_count(name):
    # Two files hold small extras: a rotary table (glm-4-9b) and gates of the shared expert (qwen1.5-moe).
    exact = name not in {"glm-4-9b", "qwen1.5-moe-a2.7b"}
    assert load_shape(name).total_params == pytest.approx(PUBLISHED[name], rel=0 if exact else 1e-4)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shape_files_say_where_they_are_from(name):
    import gllm.model_shape as module

    config = json.loads((module._SHAPES / f"{name}.json").read_text())
    assert config["source"].startswith("huggingface.co/")


def test_parts_of_a_small_llama_by_hand():
    shape = shape_of_config(LLAMA, name="tiny")
    assert (shape.head_dim, shape.num_kv_heads) == (2, 4)
    assert shape.attention_params == 4 * 8 * 8
    assert shape.dense_mlp_params == 3 * 8 * 16
    assert shape.norm_params == 16
    assert shape.total_params == 2 * (256 + 384 + 16) + 2 * 32 * 8 + 8
    assert shape.kv_bytes_per_token == 2 * 4 * 2 * 2
    assert not shape.is_moe


def test_biases_and_head_norms_follow_the_model_type():
    assert shape_of_config({**LLAMA, "model_type": "qwen2"}, name="tiny").attention_params == 256 + 24
    assert shape_of_config({**LLAMA, "model_type": "qwen3"}, name="tiny").norm_params == 16 + 4
    assert shape_of_config({**LLAMA, "model_type": "glm4"}, name="tiny").norm_params == 32
    assert shape_of_config({**LLAMA, "model_type": "gemma2"}, name="tiny").tie_word_embeddings


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"first_k_dense_replace": 1}, (1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
    ],
)
def test_expert_layers_follow_the_pattern(extra, layers):
    shape = shape_of_config({**MOE, **extra}, name="tiny")
    assert shape.moe_layers == layers
    dense = 6 - len(layers)
    per_layer = shape.attention_params + shape.norm_params
    experts = len(layers) * (4 * 3 * 8 * 6 + 8 * 4)
    assert shape.total_params == 6 * per_layer + dense * 3 * 8 * 16 + experts + 2 * 32 * 8 + 8


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts"])
def test_experts_have_several_names(key):
    config = {name: value for name, value in MOE.items() if name not in {"num_experts", "moe_intermediate_size"}}
    shape = shape_of_config({**config, key: 4, "n_shared_experts": 2}, name="tiny")
    assert (shape.num_experts, shape.moe_intermediate_size, shape.shared_expert_intermediate_size) == (4, 16, 32)


def test_chatglm_names_and_dtypes():
    shape = load_shape("glm-4-9b")
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (40, 2, 128, 151_552)
    assert shape_of_config({**LLAMA, "dtype": "float32"}, name="tiny").dtype_bytes == 4
    assert (
        shape_of_config({**LLAMA, "multi_query_attention": False, "multi_query_group_num": 2}, name="t").num_kv_heads
        == 4
    )


def test_name_folder_file_and_hub_name(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": LLAMA, "torch_dtype": "float16"}))
    assert load_shape(folder) == load_shape(str(folder / "config.json"))
    assert load_shape(folder).name == "mine"
    assert load_shape("Qwen/Qwen3-32B") == load_shape("qwen3-32b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "key hidden_size is missing"),
        ({"num_hidden_layers": 0}, "key num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "key vocab_size is 'many'"),
        ({"num_attention_heads": True}, "key num_attention_heads is True"),
        ({"num_attention_heads": 3}, "add head_dim"),
        ({"torch_dtype": "int3"}, "torch_dtype is 'int3'"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["linear_attention"]}, "linear attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_experts": 4}, "key num_experts_per_tok"),
    ],
)
def test_a_bad_config_names_file_and_key(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(ValueError, match=message) as error:
        load_shape(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_shape(path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"folder with a config\.json.*llama-3\.1-8b.*qwen3-8b"):
        load_shape("qwen9-1b")


def test_loading_imports_nothing_heavy():
    code = (
        "import sys; from gllm.model_shape import load_shape; load_shape('qwen3-8b');"
        "sys.exit(bool({'numpy', 'torch', 'pandas', 'simpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own code
