"""The default model's shape, and the files of its folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gllm.runtime.default_model.tokenizer import END_OF_TEXT, IM_END, PAD, VOCAB_SIZE, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": IM_END,
    "pad_token_id": PAD,
    "torch_dtype": "bfloat16",
}
"""config.json. Four layers go over up to four stages, two KV heads over two tensor-parallel ranks."""

GENERATION = {"do_sample": False, "eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": PAD}
"""generation_config.json: the likeliest token, until either end."""


def write_model(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the folder: config, generation config, weights, tokenizer."""
    from safetensors.torch import save  # noqa: PLC0415 - the shape is read without torch

    tied = {name: weight.cpu().contiguous() for name, weight in weights.items() if name != "lm_head.weight"}
    (folder / "model.safetensors").write_bytes(save(tied, metadata={"format": "pt"}))
    for name, value in (("config.json", MODEL), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    write_tokenizer(folder)
