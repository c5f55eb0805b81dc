"""Prefills before decodes, never mixed (vLLM V0's default scheduler)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.core import Batch, Order
from gllm.policy.order import Fcfs
from gllm.policy.room import check_budget, fill, make_room, nothing_to_plan

if TYPE_CHECKING:
    from gllm.core import Decision, Limits, View
    from gllm.policy.room import Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFirst:
    """If any waiting prompt fits, run whole prompts only, up to the budget; else decode all."""

    token_budget: int = 8192
    watermark: float = 0.01
    order: Order = Fcfs()

    def __post_init__(self) -> None:
        check_budget(self.token_budget, self.watermark)

    def decide(self, view: View) -> Decision:
        """Prompts if any fits, decodes otherwise."""
        prompts = whole_prompts(view, self.order, self.token_budget, self.watermark)
        if prompts:
            return Batch(prompts)
        if not view.num_ready:
            return nothing_to_plan(view, self.order)
        return make_room(view, self.order, view.num_ready) or Batch(num_decode=view.num_ready)

    def max_batch_tokens(self, limits: Limits) -> int:
        """The budget, or one longest prompt, or every sequence's decode step."""
        return max(self.token_budget, limits.max_tokens_per_sequence, limits.max_num_seqs)


def whole_prompts(view: View, order: Order, budget: int, watermark: float) -> Chunks:
    """Waiting prompts that fit whole into `budget` tokens; a longer one goes alone."""
    longest = max(budget, view.limits.max_tokens_per_sequence)
    chunks = fill(view, order, longest, watermark=watermark)
    total = 0
    for index, (sequence, count) in enumerate(chunks):
        total += count
        whole = count == sequence.num_uncomputed_tokens - view.cached_tokens(sequence)
        if index and (total > budget or not whole):
            return chunks[:index]
    return chunks
