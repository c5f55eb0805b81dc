"""Llama 2, 3, 3.1, 3.2, deepseek-coder (its rope is scaled linearly) and Mistral without a sliding window.

Reference: huggingface/transformers, models/llama.
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.stage import StageModel

OUTER = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
ATTENTION = {
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.qkv.q": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.qkv.k": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.qkv.v": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.out": "model.layers.*.self_attn.o_proj",
    "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
}
MLP = {
    "layers.*.mlp.gate_up.gate": "model.layers.*.mlp.gate_proj",
    "layers.*.mlp.gate_up.up": "model.layers.*.mlp.up_proj",
    "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
}


class Llama(StageModel):
    """The plain decoder."""

    names: ClassVar = {**OUTER, **ATTENTION, **MLP}
