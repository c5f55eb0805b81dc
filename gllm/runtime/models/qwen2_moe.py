"""Qwen1.5-MoE and Qwen2-MoE: experts, and a shared one behind a gate of its own.

Reference: huggingface/transformers, models/qwen2_moe.
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.llama import ATTENTION, MLP, OUTER
from gllm.runtime.models.sparse import SparseStageModel

EXPERTS = {
    "layers.*.mlp.router": "model.layers.*.mlp.gate",
    "layers.*.mlp.experts.gate_up.*.gate": "model.layers.*.mlp.experts.*.gate_proj",
    "layers.*.mlp.experts.gate_up.*.up": "model.layers.*.mlp.experts.*.up_proj",
    "layers.*.mlp.experts.down.*": "model.layers.*.mlp.experts.*.down_proj",
}
SHARED = {
    "layers.*.mlp.shared_gate": "model.layers.*.mlp.shared_expert_gate",
    "layers.*.mlp.shared.gate_up.gate": "model.layers.*.mlp.shared_expert.gate_proj",
    "layers.*.mlp.shared.gate_up.up": "model.layers.*.mlp.shared_expert.up_proj",
    "layers.*.mlp.shared.down": "model.layers.*.mlp.shared_expert.down_proj",
}


class Qwen2Moe(SparseStageModel):
    """Layers named in mlp_only_layers, or skipped by decoder_sparse_step, are dense."""

    names: ClassVar = {**OUTER, **ATTENTION, **MLP, **EXPERTS, **SHARED}
