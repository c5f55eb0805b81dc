"""ChatGLM3's forward pass over its own tensors, written out plainly: a second opinion beside GLM in transformers.

From the layout that modeling_chatglm.py documents: rows of query_key_value are all query heads, then the key groups,
then the value groups; rows of dense_h_to_4h are the gate, then up; the first half of each head turns in neighbouring
pairs; pair i of n turns by position / 10000^(i / n).
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch.nn import functional


def logits(folder, config, tokens):
    weights = load_file(folder / "model.safetensors")
    x = weights["transformer.embedding.word_embeddings.weight"][tokens]
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        mine = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + attention(norm(x, mine["input_layernorm.weight"]), mine, config)
        x = x + mlp(norm(x, mine["post_attention_layernorm.weight"]), mine)
    return norm(x, weights["transformer.encoder.final_layernorm.weight"]) @ weights["transformer.output_layer.weight"].T


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + CHATGLM_EPS).sqrt() * weight


CHATGLM_EPS = 1.5625e-07


def mlp(x, weights):
    gate, up = (x @ weights["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
    return functional.silu(gate) * up @ weights["mlp.dense_4h_to_h.weight"].T


def attention(x, weights, config):
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    fused = x @ weights["self_attention.query_key_value.weight"].T + weights["self_attention.query_key_value.bias"]
    q, k, v = fused.split([heads * size, groups * size, groups * size], -1)
    q, k, v = (each.reshape(len(x), -1, size) for each in (q, k, v))
    q, k = turned(q), turned(k)
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[:, head] @ k[:, group].T / size**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        out.append(scores.softmax(-1) @ v[:, group])
    return torch.cat(out, -1) @ weights["self_attention.dense.weight"].T


def turned(x):
    """Multiply neighbouring pairs of the first half, as complex numbers, by their rotation."""
    num_pairs = x.shape[-1] // 4
    pairs = torch.view_as_complex(x[..., : 2 * num_pairs].reshape(*x.shape[:-1], num_pairs, 2).contiguous())
    speeds = 10000.0 ** (-torch.arange(num_pairs) / num_pairs)
    angles = torch.arange(len(x))[:, None, None] * speeds
    rotated = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([rotated, x[..., 2 * num_pairs :]], -1)
