"""config.json: old and new keys, what an architecture implies, and one clear line for what is not supported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from runtime.tiny_models import CHATGLM_CONFIG
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gllm.model_shape import _SHAPES, list_shapes
from gllm.runtime.layers.rotary import inverse_frequencies
from gllm.runtime.model_config import ARCHITECTURES, config_of, load_model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 131072,
}

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, fine": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_scalings_are_those_of_transformers(scaling, key):
    given = SCALINGS[scaling]
    theirs = LlamaConfig(**LLAMA, rope_parameters={**given, "rope_theta": 1e6})
    inverse, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](theirs, "cpu")
    if key == "rope_parameters":
        keys = {**LLAMA, key: {**given, "rope_theta": 1e6}}
    else:
        kind = given["rope_type"]
        old = {name: value for name, value in given.items() if name != "rope_type"}
        keys = {**LLAMA, "rope_theta": 1e6, key: {"type": kind, **old}}
    rope = config_of(keys).rope
    torch.testing.assert_close(inverse_frequencies(rope), inverse, atol=0, rtol=1e-5)
    assert rope.attention_factor == pytest.approx(factor)


def test_yarn_makes_the_longest_sequence_longer():
    rope = {**SCALINGS["yarn"], "rope_theta": 1e6}
    keys = {**LLAMA, "max_position_embeddings": 32768}
    assert config_of({**keys, "rope_parameters": rope}).max_position_embeddings == 131072
    assert config_of(keys).max_position_embeddings == 32768


@pytest.mark.parametrize("name", list_shapes())
def test_every_model_the_project_knows_by_name_can_run(name):
    config = config_of(json.loads((_SHAPES / f"{name}.json").read_text()), name=name)
    assert config.architecture in ARCHITECTURES
    assert config.shape.name == name
    assert config.rope.rotary_dim == config.shape.head_dim // (2 if name.startswith("glm") else 1)


def test_chatglm_keys():
    config = config_of({**CHATGLM_CONFIG, "rope_ratio": 500})
    assert config.rope.theta == 5e6
    assert config.rope.interleaved
    assert config.rope.rotary_dim == 8
    assert config.rms_norm_eps == 1.5625e-07
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert config.dtype == "float32"


def test_both_files_name_tokens_that_end_a_sequence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2, "torch_dtype": "float16"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    config = load_model_config(tmp_path)
    assert config.eos_token_ids == (2, 7)
    assert config.dtype == "float16"
    (tmp_path / "generation_config.json").unlink()
    assert load_model_config(tmp_path).eos_token_ids == (2,)


WRONG = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' .*known are .*LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window is 4096"),
    "rope": ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
    "factor": ({"rope_scaling": {"type": "linear"}}, "key factor is missing"),
    "theta": ({"rope_theta": "much"}, "rope_theta is 'much'"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id holds '</s>'"),
    "size": ({"hidden_size": 0}, "hidden_size is 0"),
    "chatglm": ({**CHATGLM_CONFIG, "multi_query_attention": False}, "multi_query_attention is False"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_supported_is_one_line(wrong, tmp_path):
    changes, message = WRONG[wrong]
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder with a config\.json"):
        load_model_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model_config(tmp_path)


def test_a_config_is_read_without_torch():
    code = "import sys, gllm.runtime.model_config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
