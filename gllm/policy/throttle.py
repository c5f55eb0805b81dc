"""Token throttling (gLLM, arXiv 2504.14775, section 3.1): even micro-batches keep a pipeline full.

Prompt tokens of the next micro-batch, with #WP tokens waiting for prefill and KV_free the idle share
of the cache:

    WT       P = min(max(#WP / #T, MinP), MaxP)
    UT       P = max(MaxP * KV_free, MinP)
    WT + UT  P = max(min(#WP / #T, MaxP * (KV_free - KV_thresh) / (1 - KV_thresh)), MinP)
             and no prefill while KV_free < KV_thresh
    neither  P = MaxP

Decode tokens, with #RD decoding sequences: D = #RD / pipeline depth, all that are ready if fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.core import Batch, Order
from gllm.policy.order import Fcfs
from gllm.policy.room import fill, make_room, nothing_to_plan

if TYPE_CHECKING:
    from gllm.core import Decision, Limits, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Token throttling; its parts can be switched off one by one for the paper's ablations.

    MinP wins over UT, as the paper has it (the first implementation let UT push below MinP).
    """

    iterations: int = 8  # #T
    max_prefill: int = 2048  # MaxP
    min_prefill: int = 32  # MinP
    kv_threshold: float = 0.05  # KV_thresh
    wt: bool = True  # throttle by waiting tokens
    ut: bool = True  # throttle by cache utilisation
    split_decode: bool = True  # spread decodes over the pipeline's micro-batches
    order: Order = Fcfs()

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; it must be at least 1")
        if not 1 <= self.min_prefill <= self.max_prefill:
            raise ValueError(
                f"min_prefill is {self.min_prefill} and max_prefill {self.max_prefill}; "
                "it must be 1 <= min_prefill <= max_prefill"
            )
        if not 0 <= self.kv_threshold < 1:
            raise ValueError(f"kv_threshold is {self.kv_threshold}; it must be a share of the cache, 0 to below 1")

    def prefill_tokens(self, num_waiting_tokens: int, kv_free: float) -> int:
        """P, the prompt tokens of the next micro-batch; 0 while prefill is suspended."""
        by_waiting = num_waiting_tokens / self.iterations
        if self.wt and self.ut:
            if kv_free < self.kv_threshold:
                return 0
            share = (kv_free - self.kv_threshold) / (1 - self.kv_threshold)
            return int(max(min(by_waiting, self.max_prefill * share), self.min_prefill))
        if self.wt:
            return int(min(max(by_waiting, self.min_prefill), self.max_prefill))
        if self.ut:
            return int(max(self.max_prefill * kv_free, self.min_prefill))
        return self.max_prefill

    def decode_tokens(self, num_decoding: int, depth: int, turn: int) -> int:
        """D, the decode steps of the next micro-batch.

        What the division leaves over is spread by a rotating counter, so that five sequences on four
        stages still get five steps in four micro-batches; at least one, so that none waits for ever.
        """
        if not self.split_decode:
            return num_decoding
        return max((num_decoding + turn % depth) // depth, min(num_decoding, 1))

    def decide(self, view: View) -> Decision:
        """Both budgets at once; neither takes from the other."""
        limits = view.limits
        num_decode = min(self.decode_tokens(view.num_decoding, limits.depth, view.num_plans), view.num_ready)
        if num_decode > view.num_free_blocks:  # a step takes one block at most
            blocked = make_room(view, self.order, num_decode)
            if blocked is not None:
                return blocked
        chunks = []
        if view.num_waiting_tokens:
            budget = self.prefill_tokens(view.num_waiting_tokens, view.kv_free)
            if not (budget or view.num_decoding or view.num_in_flight):
                budget = self.min_prefill  # nothing else would ever free the cache
            chunks = fill(view, self.order, budget, num_decode=num_decode)
        if not num_decode and not chunks:
            return nothing_to_plan(view, self.order)
        return Batch(chunks, num_decode)

    def max_batch_tokens(self, limits: Limits) -> int:
        """MaxP, and a decode step of every admitted sequence."""
        return self.max_prefill + limits.max_num_seqs
