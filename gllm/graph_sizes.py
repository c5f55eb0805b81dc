"""Which steps are captured as CUDA graphs: workers capture them, profiles measure them, the simulator charges them.

A step is padded to the next size. One beyond the largest is launched kernel by kernel.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.model_shape import ModelShape

MAX_ROWS = 512
MAX_CHUNKS = 64
"""Of a step in a graph, which holds programs of chunk attention for so many beginnings of chunks."""

MAX_TOKENS = 8192
"""Of a step with chunks in a graph, however small the model."""

_LEAST_TOKENS = 256
_LAUNCH_S = 0.65e-3
"""Of a layer's kernels, one by one, by a worker that also reports: 23 ms for all of Qwen3-8B beside an H200."""

_FLOP_PER_S = 650e12
"""An H200's products of bfloat16 while it computes one prompt after another."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decodes alone worth a graph: padding costs at most an eighth of a large batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_ROWS + 1, 32)]
    largest = min(max_num_seqs, MAX_ROWS)
    return [*(size for size in sizes if size < largest), largest]


def padded(num: int, sizes: Sequence[int]) -> int:
    """What a step of no more than the largest size is padded to: the smallest one that is not below."""
    return sizes[bisect_left(sizes, num)]


def as_measured(num: int, sizes: Sequence[int], measured: Sequence[int]) -> int:
    """Where, among the points of a table, to look for what a step takes.

    At the size that it is padded to, where a graph was measured with that alone. One whose padding costs less than
    tokens do was measured with fewer, too, and what is between takes what lies between. So does all beyond the sizes.

    Args:
        num: sequences or tokens of the step.
        sizes: of graphs, increasing.
        measured: the table's points, increasing; each size is one.
    """
    if not sizes or num > sizes[-1]:
        return num
    index = bisect_left(sizes, num)
    fewest = measured[bisect_right(measured, sizes[index - 1])] if index else measured[0]
    return max(num, fewest)


def has_token_graphs(backend: str) -> bool:
    """Whether steps with chunks are captured: flash-attn's launches need their lengths on the host."""
    return backend == "triton"


def token_graph_sizes(max_batch_tokens: int, shape: ModelShape, tp: int = 1) -> list[int]:
    """Tokens of steps with chunks worth a graph, of a policy whose steps have at most `max_batch_tokens`.

    A step that keeps the GPU busy for longer than the host launches it needs none, and would only compute padding.
    Products compute in tiles of 64 or 128 rows anyway, and each graph takes time to capture.
    """
    sizes = [16, 32, 64, 96, *range(128, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)]
    sizes += range(2048, MAX_TOKENS, 1024)
    flop = 2 * _params_per_token(shape) / tp
    worthwhile = int(_LAUNCH_S * _FLOP_PER_S / flop) // 64 * 64
    largest = min(max_batch_tokens, max(_LEAST_TOKENS, min(worthwhile, MAX_TOKENS)))
    return [*(size for size in sizes if size < largest), largest]


def _params_per_token(shape: ModelShape) -> int:
    """Weights of a layer that a token meets."""
    if not shape.is_moe:
        return shape.attention_params + shape.dense_mlp_params
    experts = shape.num_experts_per_token * shape.expert_params + shape.shared_expert_params + shape.router_params
    return shape.attention_params + experts
