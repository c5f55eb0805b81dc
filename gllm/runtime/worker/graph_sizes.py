"""Which steps are captured as CUDA graphs; who profiles them must know, without torch."""

from __future__ import annotations

MAX_ROWS = 512

MAX_TOKENS = 4096
"""Of a step with chunks of prompts in a graph: what is longer keeps a GPU busy for longer than a host launches it."""

MAX_CHUNKS = 64
"""Of a step in a graph, which holds programs of chunk attention for so many beginnings of chunks."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decodes alone worth a graph: padding costs at most an eighth of a large batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_ROWS + 1, 32)]
    largest = min(max_num_seqs, MAX_ROWS)
    return [*(size for size in sizes if size < largest), largest]


def token_graph_sizes(max_batch_tokens: int) -> list[int]:
    """Tokens of steps with chunks worth a graph: products compute in tiles of 64 or 128 rows anyway."""
    sizes = [16, 32, 64, 96, *range(128, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)]
    sizes += range(2048, MAX_TOKENS + 1, 512)
    largest = min(max_batch_tokens, MAX_TOKENS)
    return [*(size for size in sizes if size < largest), largest]
