"""What fits into a rank's memory: its weights, looked at before any is read, and cache blocks in what is left.

On a GPU the largest step is computed once, and the largest that is captured with chunks; what they take is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gllm.runtime.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.core import Limits
    from gllm.model_shape import ModelShape
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.shard import Shard

_GIB = 1 << 30
CPU_CACHE_BYTES = _GIB
"""Of a worker without a GPU, unless told otherwise; pages that no sequence reaches cost nothing."""

MAX_SAMPLED = 512  # rows whose logits exist at once

GRAPH_BYTES = _GIB // 2
"""For CUDA graphs, which are captured when the cache is there: their kernels, tables, and decode steps' activations."""


def weight_bytes(shape: ModelShape, shard: Shard, itemsize: int) -> int:
    """Weights of one rank: its share of its layers, of the embedding if it is first and of the head if it is last."""
    layers = sum(shape.layer_params(layer) for layer in shard.layers)
    tables = shard.is_first + shard.is_last - (shard.is_first and shard.is_last and shape.tie_word_embeddings)
    return (layers + tables * shape.embedding_params) // shard.tp_size * itemsize


def block_bytes(shape: ModelShape, shard: Shard, block_size: int, itemsize: int) -> int:
    """One block of the cache on one rank: keys and values of its layers and heads."""
    return 2 * len(shard.layers) * shape.kv_heads_on(shard.tp_size) * shape.head_dim * block_size * itemsize


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


def measure_peak(rehearse: Callable[[], None], device: torch.device) -> int:
    """Bytes that something takes on a GPU beyond what is there before and after it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    rehearse()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return peak


def room_for_blocks(
    shape: ModelShape,
    shard: Shard,
    config: RuntimeConfig,
    limits: Limits,
    *,
    dtype: torch.dtype,
    device: torch.device,
    peak_bytes: int,
) -> int:
    """Blocks that fit beside the weights, which are loaded, and `peak_bytes` of a step; never more than are useful.

    Raises:
        StartError: Not even one does.
    """
    block = block_bytes(shape, shard, config.block_size, dtype.itemsize)
    room = config.kv_cache_bytes
    if room is None and device.type == "cpu":
        room = CPU_CACHE_BYTES
    elif room is None:
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - (1 - config.gpu_memory_utilization) * total) - peak_bytes - GRAPH_BYTES
    if config.kv_cache_bytes is not None and room < block:
        raise StartError(f"--kv-cache-memory-bytes {room} is less than one block of the cache, {block} bytes; raise it")
    if room < block:
        raise StartError(
            f"{config.model}: no room for a KV cache beside the weights; raise --pp, --tp or --gpu-memory-utilization, "
            "or lower --block-size"
        )
    useful = limits.max_num_seqs * -(-limits.max_model_len // limits.block_size)
    return min(room // block, useful)
