"""Which decode batches are captured as CUDA graphs; who profiles them must know, without torch."""

from __future__ import annotations

MAX_ROWS = 512


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: padding costs at most an eighth of a large batch."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_ROWS + 1, 32)]
    largest = min(max_num_seqs, MAX_ROWS)
    return [*(size for size in sizes if size < largest), largest]
