"""What a forward pass must know of a model beyond its shape, read from a Hugging Face folder without torch.

Sources: the configuration classes of huggingface/transformers (models/<type>/configuration_<type>.py), its rotary
variants (modeling_rope_utils.py), and the configuration_chatglm.py beside the weights of THUDM/chatglm3-6b.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gllm.model_shape import ModelShape, shape_of_config


class Traits(NamedTuple):
    """What an architecture implies without a key in its config.json; each is a default where a key exists."""

    qkv_bias: bool = False
    o_bias: bool = False  # whether attention_bias means the output projection too
    qk_norm: bool = False
    post_norms: bool = False  # norms after attention and MLP, before each is added to the residual
    shared_expert_gate: bool = False
    norm_topk_prob: bool = False
    rope_theta: float = 10000.0
    rotary_factor: float = 1.0
    interleaved: bool = False


_GLM = Traits(qkv_bias=True, rotary_factor=0.5, interleaved=True)
_CHATGLM = Traits(rotary_factor=0.5, interleaved=True)

ARCHITECTURES: dict[str, Traits] = {
    "ChatGLMForConditionalGeneration": _CHATGLM,
    "ChatGLMModel": _CHATGLM,
    "Glm4ForCausalLM": _GLM._replace(post_norms=True),
    "GlmForCausalLM": _GLM,
    "LlamaForCausalLM": Traits(o_bias=True),
    "MistralForCausalLM": Traits(),
    "MixtralForCausalLM": Traits(norm_topk_prob=True, rope_theta=1e6),
    "Qwen2ForCausalLM": Traits(qkv_bias=True),
    "Qwen2MoeForCausalLM": Traits(qkv_bias=True, shared_expert_gate=True),
    "Qwen3ForCausalLM": Traits(o_bias=True, qk_norm=True),
    "Qwen3MoeForCausalLM": Traits(o_bias=True, qk_norm=True),
}
"""The architectures gLLM runs; `gllm.runtime.models.MODELS` holds a class for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: which dimensions of a head turn, and how fast.

    Kinds: "default" (RoFormer, arXiv 2104.09864), "linear" (positions divided by `factor`), "llama3" (long waves
    slowed down by `factor`, short ones kept), "yarn" (arXiv 2309.00071), "dynamic" (default up to the length the
    model was trained for, and no longer sequence is admitted).
    """

    theta: float
    rotary_dim: int  # the first this many of a head's dimensions turn, the rest pass
    kind: str = "default"
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of (0, n/2), (1, n/2 + 1), ...
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cosine and sine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model's shape and everything else its forward pass depends on."""

    shape: ModelShape
    architecture: str  # a key of ARCHITECTURES
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int  # the longest sequence, rope scaling counted in
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tie_word_embeddings: bool = False
    norm_topk_prob: bool = False  # weights of the chosen experts add up to one
    shared_expert_gate: bool = False
    router_scoring: str = "softmax"
    dtype: str = "bfloat16"  # torch's name
    eos_token_ids: tuple[int, ...] = ()


def load_model_config(path: str | Path) -> ModelConfig:
    """Read config.json, and generation_config.json if there is one, of a model folder.

    Raises:
        ValueError: no such folder or file, an architecture that gLLM does not run, or a key that is missing or
            holds something else than it should; one line that names it.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"model {str(path)!r}: no such folder with a config.json; give a Hugging Face model folder")
    generation = file.with_name("generation_config.json")
    return config_of(
        _read_json(file),
        generation=_read_json(generation) if generation.is_file() else {},
        name=file.absolute().parent.name,
        where=str(file),
    )


def config_of(
    keys: dict[str, Any], *, generation: dict[str, Any] | None = None, name: str = "model", where: str = "config.json"
) -> ModelConfig:
    """Turn a parsed config.json into a ModelConfig.

    Args:
        keys: the parsed config.json.
        generation: the parsed generation_config.json, whose end-of-sequence tokens count too.
        name: what to call the shape.
        where: the file's name, for errors.

    Raises:
        ValueError: as `load_model_config`.
    """
    architecture = _architecture(keys, where)
    shape = shape_of_config(keys, name=name, where=where)
    traits = ARCHITECTURES[architecture]
    _reject_variants(keys, architecture, where)
    rope = _rope(keys, shape, traits, where)
    bias = bool(keys.get("qkv_bias", keys.get("attention_bias", keys.get("add_qkv_bias", traits.qkv_bias))))
    return ModelConfig(
        shape=shape,
        architecture=architecture,
        rms_norm_eps=_number(keys, ("rms_norm_eps", "layernorm_epsilon"), where, default=1e-6),
        rope=rope,
        max_position_embeddings=max(
            shape.max_position_embeddings, int(rope.factor * rope.original_max_position) if rope.kind == "yarn" else 0
        ),
        activation="silu",
        qkv_bias=bias or bool(keys.get("add_bias_linear", False)),
        o_bias=(bias and traits.o_bias) or bool(keys.get("add_bias_linear", False)),
        mlp_bias=bool(keys.get("mlp_bias", keys.get("add_bias_linear", False))),
        qk_norm=traits.qk_norm,
        post_norms=traits.post_norms,
        tie_word_embeddings=shape.tie_word_embeddings,
        norm_topk_prob=traits.norm_topk_prob or bool(keys.get("norm_topk_prob", False)),
        shared_expert_gate=traits.shared_expert_gate,
        dtype=_dtype(keys),
        eos_token_ids=_eos_token_ids(keys, generation or {}, where),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object")  # noqa: TRY004 - a user's file
    return content


def _architecture(keys: dict[str, Any], where: str) -> str:
    names = keys.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{where}: architecture {name!r} (key architectures) is not supported; known are {known}")
    return str(name)


def _reject_variants(keys: dict[str, Any], architecture: str, where: str) -> None:
    """Refuse what a config may ask for and the layers do not do."""
    activation = keys.get("hidden_act") or keys.get("hidden_activation") or "silu"
    if activation not in ("silu", "swish"):
        raise ValueError(f"{where}: key hidden_act is {activation!r}; only silu is supported")
    slides_unasked = architecture in ("MistralForCausalLM", "MixtralForCausalLM")
    if keys.get("sliding_window") and keys.get("use_sliding_window", slides_unasked):
        raise ValueError(f"{where}: key sliding_window is {keys['sliding_window']}; only full attention is supported")
    if architecture in ("ChatGLMModel", "ChatGLMForConditionalGeneration"):
        for key, only in _CHATGLM_ONLY.items():
            if keys.get(key, only) != only:
                raise ValueError(f"{where}: key {key} is {keys[key]!r}; only {only!r} is supported for ChatGLM")


_CHATGLM_ONLY = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
}


_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def _rope(keys: dict[str, Any], shape: ModelShape, traits: Traits, where: str) -> Rope:
    """Read rope_parameters (transformers 5), or rope_theta and rope_scaling, or ChatGLM's rope_ratio."""
    given = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise ValueError(f"{where}: rope type {kind!r} is not supported; known are {', '.join(_ROPE_KINDS)}")
    both = {**keys, **given}
    fraction = _number(both, ("partial_rotary_factor",), where, default=traits.rotary_factor)
    theta = _number(both, ("rope_theta",), where, default=traits.rope_theta)
    original = _number(both, ("original_max_position_embeddings",), where, default=float(shape.max_position_embeddings))
    return Rope(
        kind=kind,
        theta=theta * _number(keys, ("rope_ratio",), where, default=1.0),
        rotary_dim=int(shape.head_dim * fraction),
        interleaved=traits.interleaved,
        factor=1.0 if kind == "default" else _number(given, ("factor",), where),
        original_max_position=int(original),
        low_freq_factor=_number(given, ("low_freq_factor",), where, default=1.0),
        high_freq_factor=_number(given, ("high_freq_factor",), where, default=4.0),
        beta_fast=_number(given, ("beta_fast",), where, default=32.0),
        beta_slow=_number(given, ("beta_slow",), where, default=1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(given, where) if kind == "yarn" else 1.0,
    )


def _attention_factor(given: dict[str, Any], where: str) -> float:
    """YaRN's temperature: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), or what the config says."""
    if given.get("attention_factor") is not None:
        return _number(given, ("attention_factor",), where)
    factor = _number(given, ("factor",), where)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return temperature(1.0)


def _number(keys: dict[str, Any], names: tuple[str, ...], where: str, *, default: float | None = None) -> float:
    """Read a positive number; null means absent."""
    name = next((each for each in names if keys.get(each) is not None), None)
    if name is None:
        if default is None:
            raise ValueError(f"{where}: key {' or '.join(names)} is missing")
        return default
    value = keys[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{where}: key {name} is {value!r}; it must be a positive number")
    return float(value)


def _dtype(keys: dict[str, Any]) -> str:
    """Torch's name of the weights' dtype; `shape_of_config` has checked it."""
    name = str(keys.get("torch_dtype") or keys.get("dtype") or "bfloat16")
    return {"half": "float16", "float": "float32"}.get(name, name)


def _eos_token_ids(keys: dict[str, Any], generation: dict[str, Any], where: str) -> tuple[int, ...]:
    """End-of-sequence tokens of both files: a chat model's generation_config often names more than its config."""
    found: list[int] = []
    for source in (keys, generation):
        given = source.get("eos_token_id")
        for token in given if isinstance(given, list) else [given]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise ValueError(f"{where}: key eos_token_id holds {token!r}; give token ids")
            if token is not None and token not in found:
                found.append(token)
    return tuple(found)
