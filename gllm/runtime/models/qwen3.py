"""Qwen3: a norm over each query and key head. Reference: huggingface/transformers, models/qwen3."""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.llama import ATTENTION, MLP, OUTER
from gllm.runtime.models.stage import StageModel

HEAD_NORMS = {
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}


class Qwen3(StageModel):
    """Dense Qwen3."""

    names: ClassVar = {**OUTER, **ATTENTION, **HEAD_NORMS, **MLP}
