"""What a benchmark may name as its model: a folder, a shape that gLLM ships, or nothing for gLLM's own small model.

Of a shape a folder with a Hugging Face config.json is made, so that every engine can serve it with random weights and
nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.model_shape import list_shapes, load_shape
from gllm.runtime.default_model import NAME, PATH
from gllm.runtime.model_config import load_model_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gllm.model_shape import ModelShape

ARCHITECTURES = {
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_SAME_AS = {"chatglm": "glm"}  # the same layers under the names that transformers gives them


@contextmanager
def model_folder(name: str | None) -> Iterator[Path]:
    """A folder with a config.json for the model of that name; one made for this is removed at the end.

    Args:
        name: a folder; a shape's name ("qwen3-8b", "Qwen/Qwen3-8B"), which goes before a folder of that name (write
            ./NAME for the folder); None: gLLM's own model.

    Raises:
        ValueError: it is none of these, or its config.json is not one that gLLM knows.
    """
    if name is None:
        yield PATH
        return
    path = Path(name).expanduser()
    known = name.rsplit("/", 1)[-1].lower()
    if known in list_shapes() and name.count("/") <= 1 and not name.startswith(("./", "/", "~")):
        with tempfile.TemporaryDirectory(prefix="gllm-bench-") as folder:
            yield write_folder(load_shape(known), Path(folder) / known)
    elif (path / "config.json").is_file():
        yield path.absolute()
    else:
        raise ValueError(
            f"model {name!r}: neither a folder with a config.json nor a shape that gLLM ships; "
            f"shapes: {', '.join(list_shapes())}"
        )


def write_folder(shape: ModelShape, folder: Path) -> Path:
    """Make the folder of a shape; what gLLM reads back from it is that shape."""
    folder.mkdir(parents=True)
    config = config_of_shape(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    read = load_model_config(folder).shape
    assert read == replace(shape, name=read.name, architecture=config["model_type"]), (read, shape)
    return folder


def config_of_shape(shape: ModelShape) -> dict[str, Any]:
    """A Hugging Face config.json of these sizes; what a size does not say is as in Qwen3's."""
    kind = _SAME_AS.get(shape.architecture, shape.architecture)
    if kind not in ARCHITECTURES:
        raise ValueError(f"{shape.name}: no config.json can be made for a {kind}; give a folder that has one")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_bias": shape.qkv_bias,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": None,  # transformers would let Mistral's slide
        "torch_dtype": "bfloat16",
        **(_experts(shape) if shape.is_moe else {}),
    }


def _experts(shape: ModelShape) -> dict[str, Any]:
    """The keys of an expert model, under the names of each family."""
    return {
        "num_experts": shape.num_experts,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_token,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "shared_expert_intermediate_size": shape.shared_expert_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(shape.num_layers) if layer not in shape.moe_layers],
        "norm_topk_prob": True,
    }


def model_name(folder: Path) -> str:
    """What results call it: the folder's name."""
    return NAME if folder == PATH else folder.name
