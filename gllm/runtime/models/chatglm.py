"""ChatGLM3 and GLM-4 in ChatGLM's own layout: q, k, v in one matrix, gate and up in one.

Reference: the modeling_chatglm.py beside the weights of THUDM/chatglm3-6b. Its rotary embedding turns the first half
of a head in interleaved pairs, as GLM's in transformers does.
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.stage import StageModel

_LAYER = "transformer.encoder.layers.*"


class ChatGlm(StageModel):
    """ChatGLMModel, multi-query attention in groups."""

    names: ClassVar = {
        "embedding": "transformer.embedding.word_embeddings",
        "layers.*.attention_norm": f"{_LAYER}.input_layernorm",
        "layers.*.attention.qkv.q": f"{_LAYER}.self_attention.query_key_value",
        "layers.*.attention.qkv.k": f"{_LAYER}.self_attention.query_key_value",
        "layers.*.attention.qkv.v": f"{_LAYER}.self_attention.query_key_value",
        "layers.*.attention.out": f"{_LAYER}.self_attention.dense",
        "layers.*.mlp_norm": f"{_LAYER}.post_attention_layernorm",
        "layers.*.mlp.gate_up.gate": f"{_LAYER}.mlp.dense_h_to_4h",
        "layers.*.mlp.gate_up.up": f"{_LAYER}.mlp.dense_h_to_4h",
        "layers.*.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
        "norm": "transformer.encoder.final_layernorm",
        "head": "transformer.output_layer",
    }
    ignored: ClassVar = ("transformer.rotary_pos_emb.inv_freq",)
