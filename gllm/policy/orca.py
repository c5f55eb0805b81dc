"""Iteration-level scheduling with reserved cache (Orca, OSDI 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.core import Batch, Order, Wait, WaitReason
from gllm.policy.order import Fcfs

if TYPE_CHECKING:
    from gllm.core import Decision, Limits, View
    from gllm.policy.room import Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Orca:
    """Whole prompts and all decodes in one batch; admitted only if the longest possible output fits.

    The reservation is why it never preempts, and why it admits few when clients set no `max_tokens`.
    """

    order: Order = Fcfs()

    def decide(self, view: View) -> Decision:
        """All decodes, and every prompt whose reservation fits."""
        chunks: Chunks = []
        limits = view.limits
        free = limits.num_blocks - view.num_reserved_blocks
        slots = limits.max_num_seqs - view.num_running
        tokens = limits.max_tokens_per_sequence
        for sequence in self.order.arrange(view):
            count = sequence.num_uncomputed_tokens - view.cached_tokens(sequence)
            free -= view.limit_blocks(sequence)
            tokens -= count
            slots -= 1
            if min(free, slots, tokens) < 0:
                break
            chunks.append((sequence, count))
        if not chunks and not view.num_ready:
            return Wait(WaitReason.CACHE_FULL if view.num_waiting else WaitReason.NOTHING_READY)
        return Batch(chunks, view.num_ready)

    def max_batch_tokens(self, limits: Limits) -> int:
        """One longest prompt's worth of prompts, and every decode."""
        return limits.max_tokens_per_sequence + limits.max_num_seqs
