"""A tiny random model of every architecture, made by transformers and saved as a hub's folder would be."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

torch.set_num_threads(1)

VOCAB_SIZE = 131  # no multiple of anything
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# Name -> (configuration class, model class, keys beyond SIZES).
TINY = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "deepseek-coder": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen2-yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN, "head_dim": 8}),
    "qwen2-moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "head_dim": 8},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm": (GlmConfig, GlmForCausalLM, {}),
    "glm4": (Glm4Config, Glm4ForCausalLM, {}),
}
NAMES = (*TINY, "chatglm")


def make(name, folder, *, max_shard_size="1GB"):
    """Save the tiny model of that name into the folder and return transformers' model, in float32.

    ChatGLM's own layout is GLM's with other names, and with q, k, v (which GLM has apart) in one matrix.
    """
    configuration, kind, keys = TINY["glm" if name == "chatglm" else name]
    model = kind(configuration(**{**SIZES, **keys})).eval()
    model.generation_config.eos_token_id = [2, 3]
    randomise(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if name == "chatglm":
        to_chatglm(folder)
    return model


@torch.no_grad()
def randomise(model, seed=0):
    """Weights large enough that every part of the model matters: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))


def to_chatglm(folder):
    """Rewrite a saved GLM in the layout and with the config keys of ChatGLM3."""
    weights = load_file(folder / "model.safetensors")
    renamed = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    renamed |= {_OUTER[name]: tensor for name, tensor in weights.items() if name in _OUTER}
    for layer in range(SIZES["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        renamed |= {theirs + there: weights[ours + here] for here, there in _LAYER.items()}
        for kind in ("weight", "bias"):
            fused = [weights[f"{ours}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            renamed[f"{theirs}self_attention.query_key_value.{kind}"] = torch.cat(fused)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CHATGLM_CONFIG))


_OUTER = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
    "mlp.gate_up_proj.weight": "mlp.dense_h_to_4h.weight",
    "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
}
# The keys of chatglm3-6b's config.json, with the sizes above.
CHATGLM_CONFIG = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 48,
    "hidden_size": 32,
    "kv_channels": 16,
    "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": VOCAB_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
