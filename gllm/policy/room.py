"""What every batching policy needs: filling a prompt budget, and finding room in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.core import Phase, Preempt, Wait, WaitReason

if TYPE_CHECKING:
    from gllm.core import Decision, Order, SequenceView, View

Chunks = list[tuple["SequenceView", int]]


def check_budget(token_budget: int, watermark: float) -> None:
    """Raise ValueError unless both make sense."""
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    if not 0 <= watermark < 1:
        raise ValueError(f"watermark is {watermark}; it must be a share of the cache, 0 to below 1")


def fill(view: View, order: Order, budget: int, *, num_decode: int = 0, watermark: float = 0.0) -> Chunks:
    """Chunks of up to `budget` prompt tokens: half-done prompts first, then waiting ones in `order`.

    A waiting sequence is admitted only if its whole prompt fits beside what half-done prompts still
    need and `num_decode` steps of this batch, so that prompts cannot starve each other. `watermark`
    is the share of the cache that admission leaves free while others run.
    """
    chunks: Chunks = []
    slots = view.limits.max_num_seqs - view.num_running
    if budget <= 0 or not (view.num_prefilling or (slots and view.num_waiting)):
        return chunks
    free = view.num_free_blocks - num_decode  # a decode step takes one block at most
    for sequence in view.prefilling:
        rest = sequence.num_uncomputed_tokens
        blocks = view.chunk_blocks(sequence, rest)
        if blocks <= free and budget > 0:
            chunks.append((sequence, min(budget, rest)))
            budget -= rest
        free -= blocks
    if budget <= 0 or slots <= 0 or not view.num_waiting:
        return chunks
    if view.num_running:
        free -= int(watermark * view.limits.num_blocks)
    for sequence in order.arrange(view):
        rest = sequence.num_uncomputed_tokens - view.cached_tokens(sequence)
        free -= view.chunk_blocks(sequence, rest)
        if free < 0:
            break  # whoever is first in line is not overtaken
        chunks.append((sequence, min(budget, rest)))
        budget -= rest
        slots -= 1
        if budget <= 0 or slots <= 0:
            break
    return chunks


def make_room(view: View, order: Order, num_decode: int) -> Decision | None:
    """None if the cache holds `num_decode` more steps; else whom to preempt, or to wait."""
    if view.decode_blocks(num_decode) <= view.num_free_blocks:
        return None
    return preempt_last(view, order)


def preempt_last(view: View, order: Order) -> Decision:
    """Preempt the least urgent admitted sequence that is idle, never the most urgent one of all.

    Waits while all candidates are on the road: what comes back may free the room by itself.
    """
    running = [(order.key(sequence.request), sequence.id, sequence) for sequence in view.running]
    first = min(entry[:2] for entry in running)
    idle = [entry for entry in running if entry[:2] != first and not view.on_road(entry[2])]
    if not idle:
        return Wait(WaitReason.CACHE_FULL)
    return Preempt((max(idle, key=lambda entry: entry[:2])[2],))


def nothing_to_plan(view: View, order: Order) -> Decision:
    """What to say when neither a chunk nor a step can be planned.

    If nothing is on the road either, half-done prompts block each other: the last one gives way.
    """
    blocked = not view.num_in_flight and any(s.phase is Phase.PREFILLING for s in view.running)
    if blocked and view.num_running > 1:
        return preempt_last(view, order)
    return Wait(WaitReason.CACHE_FULL if view.num_waiting else WaitReason.NOTHING_READY)
