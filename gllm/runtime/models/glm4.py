"""GLM-4: gate and up in one matrix, half of each head turns, pairs interleaved; the newer kind norms four times.

Reference: huggingface/transformers, models/glm (GLM-4-9B) and models/glm4 (GLM-4-0414).
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.llama import ATTENTION, OUTER
from gllm.runtime.models.stage import StageModel

_MLP = {
    "layers.*.mlp.gate_up.gate": "model.layers.*.mlp.gate_up_proj",
    "layers.*.mlp.gate_up.up": "model.layers.*.mlp.gate_up_proj",
    "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
}


class Glm(StageModel):
    """GlmForCausalLM."""

    names: ClassVar = {**OUTER, **ATTENTION, **_MLP}


class Glm4(StageModel):
    """Glm4ForCausalLM: attention's and MLP's outputs are normed too."""

    names: ClassVar = {
        **Glm.names,
        "layers.*.after_attention": "model.layers.*.post_self_attn_layernorm",
        "layers.*.after_mlp": "model.layers.*.post_mlp_layernorm",
    }
