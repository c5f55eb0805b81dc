"""The shape of a decoder-only transformer: what its size, speed and memory follow from.

Read from a Hugging Face config.json, without torch or transformers. `load_shape` takes one of the names of
`list_shapes`, a folder that holds a config.json, or such a file.

    llama-like layer:  norm · q, k, v projections · attention · o projection · norm · gated MLP (gate, up, down)
    expert layer:      the MLP is a router over `num_experts` small gated MLPs, plus a shared one in some models

Sources for the keys: the configuration classes of huggingface/transformers (models/llama, qwen2_moe, qwen3_moe,
mixtral, glm4, ...) and, for chatglm, the configuration_chatglm.py beside the weights of THUDM/glm-4-9b-chat.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHAPES = Path(__file__).with_name("shapes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of one model; every `*_params` counts weights of the whole model, before any split over GPUs."""

    name: str
    architecture: str  # Hugging Face's model_type: "llama", "qwen3_moe", ...
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of a dense layer's MLP
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    dtype_bytes: int = 2
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each query and key head
    norms_per_layer: int = 2
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of one expert
    shared_expert_intermediate_size: int = 0  # of the expert every token visits; 0: there is none
    moe_layers: tuple[int, ...] = ()  # indices of the layers whose MLP is a set of experts

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return bool(self.moe_layers)

    @property
    def attention_params(self) -> int:
        """Q, k, v and o projections of one layer, biases included."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv) + (q + 2 * kv if self.qkv_bias else 0)

    @property
    def dense_mlp_params(self) -> int:
        """Gate, up and down projections of one dense layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_params(self) -> int:
        """Gate, up and down projections of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def shared_expert_params(self) -> int:
        """Gate, up and down projections of one layer's shared expert."""
        return 3 * self.hidden_size * self.shared_expert_intermediate_size

    @property
    def router_params(self) -> int:
        """The projection of one layer that scores the experts."""
        return self.hidden_size * self.num_experts

    @property
    def norm_params(self) -> int:
        """Norm weights of one layer."""
        return self.norms_per_layer * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def moe_mlp_params(self) -> int:
        """All experts, the shared one and the router of one expert layer."""
        return self.num_experts * self.expert_params + self.shared_expert_params + self.router_params

    def layer_params(self, layer: int) -> int:
        """All weights of the layer with that index."""
        mlp = self.moe_mlp_params if layer in self.moe_layers else self.dense_mlp_params
        return self.attention_params + self.norm_params + mlp

    @property
    def embedding_params(self) -> int:
        """The token embedding; the head's matrix is as large."""
        return self.vocab_size * self.hidden_size

    @property
    def head_params(self) -> int:
        """Weights the head adds to the model: none where it is tied to the embedding."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @property
    def total_params(self) -> int:
        """All weights, a tied head counted once."""
        layers = sum(self.layer_params(layer) for layer in range(self.num_layers))
        return layers + self.embedding_params + self.head_params + self.hidden_size

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers one token leaves in one layer's cache: a key and a value per KV head."""
        return 2 * self.num_kv_heads * self.head_dim

    def kv_heads_on(self, tp: int) -> int:
        """KV heads that each of `tp` ranks holds: its share, and at least one, for fewer heads than ranks repeat."""
        return max(1, self.num_kv_heads // tp)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token leaves in one layer's cache, kept in the weights' dtype."""
        return self.kv_elements_per_token * self.dtype_bytes


def list_shapes() -> tuple[str, ...]:
    """Names `load_shape` knows, sorted."""
    return tuple(sorted(path.stem for path in _SHAPES.glob("*.json")))


def load_shape(name_or_path: str | Path) -> ModelShape:
    """Read the shape of a known model, or of a config.json on disk.

    A known name goes before a folder of that name (write ./NAME for the folder). Upper case and a hub's owner do
    not matter: "Qwen/Qwen3-32B" is "qwen3-32b".

    Raises:
        ValueError: no such name or file, a file that is no config.json, or a model whose layers are not of the
            kinds above (multi-head latent attention, linear attention, quantised weights).
    """
    text = str(name_or_path)
    known = _SHAPES / f"{text.rsplit('/', 1)[-1].lower()}.json"
    if text.count("/") <= 1 and not text.startswith(("./", "/", "~")) and known.is_file():
        return _read(known, name=known.stem)
    path = Path(text).expanduser()
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ValueError(
            f"model {text!r}: neither a known name nor a folder with a config.json nor such a file; "
            f"known names: {', '.join(list_shapes())}"
        )
    return _read(path, name=path.absolute().parent.name if path.name == "config.json" else path.stem)


def _read(path: Path, *, name: str) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); give a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no JSON object; give a Hugging Face config.json")  # noqa: TRY004 - a user's file
    nested = config.get("text_config")
    return shape_of_config({**config, **nested} if isinstance(nested, dict) else config, name=name, where=str(path))


def shape_of_config(config: Mapping[str, Any], *, name: str, where: str = "config.json") -> ModelShape:
    """Turn the keys of a Hugging Face config into a shape.

    Args:
        config: the parsed config.json, a nested text_config already laid over it.
        name: what to call the shape.
        where: the file's name, for errors.

    Raises:
        ValueError: a key is missing or holds something else than a size, or the model is of another kind.
    """
    keys = _Keys(config, where)
    keys.reject_other_kinds()
    hidden_size, num_heads, num_layers = keys.size("hidden_size"), keys.size("num_heads"), keys.size("num_layers")
    if "head_dim" not in config and "kv_channels" not in config and hidden_size % num_heads:
        raise ValueError(f"{where}: hidden_size {hidden_size} is no multiple of {num_heads} heads; add head_dim")
    intermediate_size, num_experts = keys.size("intermediate_size"), keys.size("num_experts", 0)
    moe_intermediate_size = keys.size("moe_intermediate_size", intermediate_size) if num_experts else 0
    shared_size = keys.size("n_shared_experts", 0) * moe_intermediate_size
    kind = str(config.get("model_type", "llama"))
    return ModelShape(
        name=name,
        architecture=kind,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads
        if config.get("multi_query_attention") is False
        else keys.size("num_kv_heads", num_heads),
        head_dim=keys.size("head_dim", hidden_size // num_heads),
        intermediate_size=intermediate_size,
        vocab_size=keys.size("vocab_size"),
        max_position_embeddings=keys.size("max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
        dtype_bytes=keys.dtype_bytes(),
        qkv_bias=bool(config.get("attention_bias", config.get("add_qkv_bias", kind in _QKV_BIAS))),
        qk_norm=bool(config.get("use_qk_norm", kind in _QK_NORM)),
        norms_per_layer=4 if kind in _FOUR_NORMS else 2,
        num_experts=num_experts,
        num_experts_per_token=keys.size("num_experts_per_token") if num_experts else 0,
        moe_intermediate_size=moe_intermediate_size,
        shared_expert_intermediate_size=keys.size("shared_expert_intermediate_size", shared_size),
        moe_layers=keys.moe_layers(num_layers) if num_experts else (),
    )


# What a model_type implies without saying so in its config (transformers, models/<type>/modeling_<type>.py).
_QKV_BIAS = ("qwen2", "qwen2_moe")
_QK_NORM = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
_FOUR_NORMS = ("glm4", "gemma2", "gemma3", "gemma3_text")  # norms after attention and MLP too

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}

# One name here, several there; the first key present counts.
_ALIASES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok", "num_experts_per_token"),
}


@dataclass(frozen=True, slots=True)
class _Keys:
    """A config's keys, read with errors that name the file and the key."""

    config: Mapping[str, Any]
    where: str

    def size(self, field: str, default: int | None = None) -> int:
        """Read a size: positive, or zero where zero is its default; null means absent, as in Hugging Face's files."""
        names = _ALIASES.get(field, (field,))
        key = next((name for name in names if self.config.get(name) is not None), None)
        if key is None:
            if default is None:
                raise ValueError(f"{self.where}: key {' or '.join(names)} is missing; give a decoder's config.json")
            return default
        value = self.config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if default == 0 else 1):
            raise ValueError(f"{self.where}: key {key} is {value!r}; it must be a positive whole number")
        return value

    def dtype_bytes(self) -> int:
        """Bytes per weight; a config that does not say is taken for a 16-bit one."""
        name = self.config.get("torch_dtype") or self.config.get("dtype") or "bfloat16"
        if name not in _DTYPE_BYTES:
            raise ValueError(f"{self.where}: key torch_dtype is {name!r}; known are {', '.join(_DTYPE_BYTES)}")
        return _DTYPE_BYTES[name]

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of expert layers: Qwen's rule (decoder_sparse_step, mlp_only_layers), then DeepSeek's."""
        step, frequency = self.size("decoder_sparse_step", 1), self.size("moe_layer_freq", 1)
        first, dense = self.size("first_k_dense_replace", 0), set(self.config.get("mlp_only_layers") or ())
        return tuple(
            layer
            for layer in range(num_layers)
            if layer not in dense and (layer + 1) % step == 0 and layer >= first and layer % frequency == 0
        )

    def reject_other_kinds(self) -> None:
        """Refuse models whose cost this shape cannot describe, rather than guess."""
        if self.config.get("kv_lora_rank"):
            raise ValueError(f"{self.where}: multi-head latent attention (kv_lora_rank) is not supported yet")
        kinds = set(self.config.get("layer_types") or ()) - {"full_attention"}
        if "sliding_attention" in kinds:
            raise ValueError(f"{self.where}: sliding-window attention (layer_types) is not supported yet")
        if kinds or self.config.get("linear_num_key_heads"):
            raise ValueError(f"{self.where}: linear attention or other layer_types are not supported yet")
        if self.config.get("quantization_config"):
            raise ValueError(f"{self.where}: quantised weights are not supported yet; give the bf16 model's config")
