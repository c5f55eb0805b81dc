"""Chunked prefill with a fixed token budget (Sarathi-Serve, arXiv 2403.02310)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.core import Batch, Order
from gllm.policy.order import Fcfs
from gllm.policy.room import check_budget, fill, make_room, nothing_to_plan

if TYPE_CHECKING:
    from gllm.core import Decision, Limits, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Sarathi:
    """All ready decodes first; the rest of the budget goes to prompt chunks, so no decode ever stalls."""

    token_budget: int = 2048
    watermark: float = 0.01  # share of the cache kept free at admission, as in vLLM V0
    order: Order = Fcfs()

    def __post_init__(self) -> None:
        check_budget(self.token_budget, self.watermark)

    def decide(self, view: View) -> Decision:
        """Decodes, then chunks."""
        num_decode = min(view.num_ready, self.token_budget)
        if num_decode > view.num_free_blocks:  # a step takes one block at most
            blocked = make_room(view, self.order, num_decode)
            if blocked is not None:
                return blocked
        chunks = fill(view, self.order, self.token_budget - num_decode, num_decode=num_decode, watermark=self.watermark)
        if not num_decode and not chunks:
            return nothing_to_plan(view, self.order)
        return Batch(chunks, num_decode)

    def max_batch_tokens(self, limits: Limits) -> int:  # noqa: ARG002 - whatever the limits
        """The budget."""
        return self.token_budget
