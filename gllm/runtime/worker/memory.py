"""What fits into a rank's memory: its weights, looked at before any is read, and cache blocks in what is left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gllm.runtime.errors import StartError

if TYPE_CHECKING:
    from gllm.core import Limits
    from gllm.model_shape import ModelShape
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.shard import Shard

_GIB = 1 << 30
CPU_CACHE_BYTES = _GIB
"""Of a worker without a GPU, unless told otherwise; pages that no sequence reaches cost nothing."""

MAX_SAMPLED = 512  # rows whose logits exist at once


def weight_bytes(shape: ModelShape, shard: Shard, itemsize: int) -> int:
    """Weights of one rank: its share of its layers, of the embedding if it is first and of the head if it is last."""
    layers = sum(shape.layer_params(layer) for layer in shard.layers)
    tables = shard.is_first + shard.is_last - (shard.is_first and shard.is_last and shape.tie_word_embeddings)
    return (layers + tables * shape.embedding_params) // shard.tp_size * itemsize


def block_bytes(shape: ModelShape, shard: Shard, block_size: int, itemsize: int) -> int:
    """One block of the cache on one rank: keys and values of its layers and heads."""
    return 2 * len(shard.layers) * shape.kv_heads_on(shard.tp_size) * shape.head_dim * block_size * itemsize


def activation_bytes(shape: ModelShape, shard: Shard, num_tokens: int, itemsize: int) -> int:
    """Widest moment of a layer for a micro-batch, with room for its copies, and the last stage's logits."""
    attention = 2 * (shape.num_heads + max(shard.tp_size, shape.num_kv_heads)) * shape.head_dim
    rows = max(1, shape.num_experts_per_token)
    mlp = max(3 * shape.intermediate_size, rows * (2 * shape.hidden_size + 3 * shape.moe_intermediate_size))
    layer = num_tokens * (4 * shape.hidden_size + 2 * max(attention, mlp) // shard.tp_size) * itemsize
    return layer + (3 * 4 * shape.vocab_size * min(MAX_SAMPLED, num_tokens) if shard.is_last else 0)


def check_weights(shape: ModelShape, shard: Shard, config: RuntimeConfig, itemsize: int, device: torch.device) -> None:
    """See that a rank's weights, and the cache if its size is given, fit, before any weight is read.

    Raises:
        StartError: They do not.
    """
    needed, free = weight_bytes(shape, shard, itemsize), _free_bytes(config, device)
    if free is not None and needed > free:
        raise StartError(
            f"{config.model}: a worker's weights take {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free on its "
            f"{device.type}; raise --pp or --tp, or choose a smaller --dtype"
        )
    cache = (config.num_blocks or 0) * block_bytes(shape, shard, config.block_size, itemsize)
    if free is not None and needed + cache > free:
        raise StartError(
            f"--num-blocks {config.num_blocks} takes {cache / _GIB:.1f} GiB of a worker, "
            f"{(free - needed) / _GIB:.1f} GiB are free on its {device.type} beside the weights; lower it"
        )


def _free_bytes(config: RuntimeConfig, device: torch.device) -> int | None:
    """Memory for one worker now; None where the machine does not say."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 // config.num_local_workers


def room_for_blocks(  # noqa: PLR0917 - what fits depends on all of them
    shape: ModelShape,
    shard: Shard,
    config: RuntimeConfig,
    limits: Limits,
    max_batch_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Blocks that fit beside the weights, which are loaded; no more than all sequences could ever fill.

    Raises:
        StartError: Not even one does.
    """
    block = block_bytes(shape, shard, config.block_size, dtype.itemsize)
    room = config.kv_cache_bytes
    if room is None and device.type == "cpu":
        room = CPU_CACHE_BYTES
    elif room is None:
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - (1 - config.gpu_memory_utilization) * total)
        room -= activation_bytes(shape, shard, max_batch_tokens, dtype.itemsize)
    if config.kv_cache_bytes is not None and room < block:
        raise StartError(f"--kv-cache-memory-bytes {room} is less than one block of the cache, {block} bytes; raise it")
    if room < block:
        raise StartError(
            f"{config.model}: no room for a KV cache beside the weights; raise --pp, --tp or --gpu-memory-utilization, "
            "or lower --block-size"
        )
    useful = limits.max_num_seqs * -(-limits.max_model_len // limits.block_size)
    return min(room // block, useful)
