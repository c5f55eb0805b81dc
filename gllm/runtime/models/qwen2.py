"""Qwen2 and Qwen2.5: Llama with biases on q, k and v. Reference: huggingface/transformers, models/qwen2."""

from __future__ import annotations

from gllm.runtime.models.llama import Llama


class Qwen2(Llama):
    """Llama's names; the configuration brings the biases."""
