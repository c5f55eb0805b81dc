"""Mixtral: every layer a set of experts, which the checkpoint calls w1 (gate), w3 (up) and w2 (down).

Reference: huggingface/transformers, models/mixtral; arXiv 2401.04088.
"""

from __future__ import annotations

from typing import ClassVar

from gllm.runtime.models.llama import ATTENTION, OUTER
from gllm.runtime.models.sparse import SparseStageModel


class Mixtral(SparseStageModel):
    """Llama's attention over experts."""

    names: ClassVar = {
        **OUTER,
        **ATTENTION,
        "layers.*.mlp.router": "model.layers.*.block_sparse_moe.gate",
        "layers.*.mlp.experts.gate_up.*.gate": "model.layers.*.block_sparse_moe.experts.*.w1",
        "layers.*.mlp.experts.gate_up.*.up": "model.layers.*.block_sparse_moe.experts.*.w3",
        "layers.*.mlp.experts.down.*": "model.layers.*.block_sparse_moe.experts.*.w2",
    }
