"""How many KV cache blocks fit beside the weights: the number that most of a simulated run hangs on.

An engine on the hardware measures what is left after a trial step; this is the estimate for when there is none.
All numbers are of one GPU; the tightest stage decides, since every stage holds the same blocks of its own layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gllm.model_shape import ModelShape
    from gllm.parallel import Parallel, Stage
    from gllm.sim.gpus import Gpu

_MIB = 1024 * 1024
_GIB = 1024 * _MIB

# Round figures for torch 2 on data-centre GPUs, not measurements.
CONTEXT_BYTES = 600 * _MIB  # CUDA context, loaded kernels, cuBLAS workspace
COLLECTIVES_BYTES = 400 * _MIB  # NCCL's channels, where there is more than one GPU
GRAPHS_BYTES = 1024 * _MIB  # captured decode batches share one pool
MAX_SAMPLED = 512  # rows whose logits exist at once


def weight_bytes(shape: ModelShape, parallel: Parallel, stage: Stage) -> int:
    """Weights of one GPU of that stage: slices of every matrix, norms and routers whole.

    The first stage has its slice of the embedding and the last of the head; tied, a single stage has one for both.
    """
    tp = parallel.tp
    experts = shape.num_experts * shape.expert_params + shape.shared_expert_params
    params = (
        stage.num_layers * (parallel.attention_params_per_rank(shape) + shape.norm_params)
        + stage.num_dense * -(-shape.dense_mlp_params // tp)
        + stage.num_moe * (-(-experts // tp) + shape.router_params)
    )
    num_tables = stage.is_first + stage.is_last - (stage.is_first and stage.is_last and shape.tie_word_embeddings)
    return (params + num_tables * -(-shape.embedding_params // tp)) * shape.dtype_bytes


def activation_bytes(shape: ModelShape, parallel: Parallel, max_batch_tokens: int, *, is_last: bool) -> int:
    """Widest moment of a layer for the largest batch, and on the last stage its logits in 32 bits, twice.

    Alive at once: hidden state, residual, a product's input and output, and either q, k, v and the attention's
    output, or the MLP's gate, up and their product; an expert layer has a row for each expert of a token.
    """
    tp, hidden = parallel.tp, shape.hidden_size
    attention = (2 * shape.num_heads // tp + 2 * parallel.kv_heads_per_rank(shape)) * shape.head_dim
    rows = shape.num_experts_per_token
    mlp = max(
        3 * shape.intermediate_size // tp if len(shape.moe_layers) < shape.num_layers else 0,
        rows * (2 * hidden + 3 * shape.moe_intermediate_size * parallel.ep // tp),
    )
    layer = max_batch_tokens * (4 * hidden + max(attention, mlp)) * shape.dtype_bytes
    return layer + (2 * 4 * shape.vocab_size * min(MAX_SAMPLED, max_batch_tokens) if is_last else 0)


def block_bytes(shape: ModelShape, parallel: Parallel, stage: Stage, *, block_size: int, kv_dtype_bytes: int) -> int:
    """Bytes of one block on one GPU of that stage: keys and values of its layers and heads."""
    per_token = 2 * parallel.kv_heads_per_rank(shape) * shape.head_dim * kv_dtype_bytes
    return stage.num_layers * per_token * block_size


def kv_capacity(
    shape: ModelShape,
    gpu: Gpu,
    parallel: Parallel,
    *,
    memory_utilization: float = 0.9,
    block_size: int = 16,
    max_batch_tokens: int,
    kv_dtype_bytes: int = 2,
) -> int:
    """Count the KV cache blocks every stage has room for.

    Args:
        shape: the model.
        gpu: what every stage runs on.
        parallel: how the model is spread.
        memory_utilization: share of a GPU's memory the engine may use.
        block_size: tokens per block.
        max_batch_tokens: tokens of the largest micro-batch.
        kv_dtype_bytes: bytes per cached number.

    Raises:
        ValueError: the model cannot be spread so, or leaves no room for a single block.
    """
    if not 0.0 < memory_utilization <= 1.0:
        raise ValueError(f"memory_utilization is {memory_utilization}; it must be above 0 and at most 1")
    if min(block_size, max_batch_tokens, kv_dtype_bytes) < 1:
        raise ValueError("block_size, max_batch_tokens and kv_dtype_bytes must be at least 1")
    parallel.check(shape)
    budget_bytes = int(gpu.memory_bytes * memory_utilization)
    fixed_bytes = CONTEXT_BYTES + GRAPHS_BYTES + (COLLECTIVES_BYTES if parallel.num_gpus > 1 else 0)
    counts = []
    for index, stage in enumerate(parallel.stages(shape)):
        needed = fixed_bytes + weight_bytes(shape, parallel, stage)
        needed += activation_bytes(shape, parallel, max_batch_tokens, is_last=stage.is_last)
        block = block_bytes(shape, parallel, stage, block_size=block_size, kv_dtype_bytes=kv_dtype_bytes)
        if needed + block > budget_bytes:
            raise ValueError(_does_not_fit(shape, gpu, needed + block, budget_bytes, index))
        counts.append((budget_bytes - needed) // block)
    return min(counts)


def _does_not_fit(shape: ModelShape, gpu: Gpu, needed_bytes: int, budget_bytes: int, stage: int) -> str:
    return (
        f"{shape.name} needs {needed_bytes / _GIB:.1f} GiB on each GPU of stage {stage}; {gpu.name} has "
        f"{budget_bytes / _GIB:.1f} GiB to use of {gpu.memory_bytes / _GIB:.1f} GiB: raise --pp or --tp, "
        "lower the batch size, or choose a GPU with more memory"
    )
