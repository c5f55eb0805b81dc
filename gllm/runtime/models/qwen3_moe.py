"""Qwen3-MoE: Qwen3's attention over experts, none of them shared.

Reference: huggingface/transformers, models/qwen3_moe.
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.llama import ATTENTION, MLP, OUTER
from gllm.runtime.models.qwen2_moe import EXPERTS
from gllm.runtime.models.qwen3 import HEAD_NORMS
from gllm.runtime.models.sparse import SparseStageModel


class Qwen3Moe(SparseStageModel):
    """Experts in place of the MLP."""

    names: ClassVar = {**OUTER, **ATTENTION, **HEAD_NORMS, **MLP, **EXPERTS}
