"""Token embedding and output head, cut by rows of the vocabulary.

Shapes: T tokens, R rows, D hidden size, V vocabulary.

A vocabulary that the ranks do not divide is padded with rows of zeros, which no token id reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm_kernels.few_rows import linear
from torch.nn import functional

from gllm.runtime.layers.sharded import Part, Placement, Sharded

if TYPE_CHECKING:
    from torch import Tensor

    from gllm.runtime.layers.norm import RmsNorm


class VocabEmbedding(Sharded):
    """A [V, D] matrix, its rows spread over the ranks: looked up on the way in, multiplied with on the way out."""

    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, *, place: Placement) -> None:
        super().__init__(place)
        self.vocab_size = vocab_size
        self.num_rows = -(-vocab_size // place.shard.tp_size)
        self.first = min(place.shard.tp_rank * self.num_rows, vocab_size)
        held = slice(self.first, min(self.first + self.num_rows, vocab_size))
        source, target = (held, slice(0, hidden_size)), (slice(0, held.stop - held.start),)
        self.add("weight", (self.num_rows, hidden_size), [Part("", (vocab_size, hidden_size), source, target)])

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings [T, D], equal on all ranks."""
        if self.shard.tp_size == 1:
            return functional.embedding(token_ids_T, self.weight)
        local_T = token_ids_T - self.first
        elsewhere_T = (local_T < 0) | (local_T >= self.num_rows)
        x_TD = functional.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return self.shard.group.all_reduce(x_TD.masked_fill(elsewhere_T[:, None], 0))

    def logits(self, norm: RmsNorm, x_RD: Tensor) -> Tensor:
        """Scores [R, V] of all tokens for the norm of x, in the weights' type, equal on all ranks."""
        local = linear(x_RD, self.weight, gain_K=norm.weight, eps=norm.eps)
        return self.shard.group.all_gather(local)[:, : self.vocab_size]
