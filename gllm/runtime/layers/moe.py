"""Experts: router, routed experts over tensor and expert parallel ranks, shared expert.

All ranks of a stage see the same tokens and route them alike; each adds up what its experts (or its slices of them)
contribute, and one sum over the stage completes both the routed and the shared experts' output.

Shapes: T tokens, D hidden size, X experts, A experts chosen per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from gllm_kernels.moe import experts
from gllm_kernels.routing import route
from torch import Tensor, nn

from gllm.runtime.layers.linear import replicated
from gllm.runtime.layers.mlp import GatedMlp
from gllm.runtime.layers.sharded import Part, Placement, Sharded
from gllm.runtime.shard import slice_of

if TYPE_CHECKING:
    from gllm.runtime.attention_batch import AttentionBatch
    from gllm.runtime.layers.norm import RmsNorm
    from gllm.runtime.model_config import ModelConfig


class SparseMlp(nn.Module):
    """An MLP of many experts of which each token visits a few, and in some models one that all tokens visit."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        shape = config.shape
        self.group = place.shard.group
        self.num_chosen, self.normalised = shape.num_experts_per_token, config.norm_topk_prob
        self.router = replicated(shape.hidden_size, shape.num_experts, place=place)
        self.experts = Experts(shape.hidden_size, shape.moe_intermediate_size, shape.num_experts, place)
        self.shared: GatedMlp | None = None
        self.shared_gate = replicated(shape.hidden_size, 1, place=place) if config.shared_expert_gate else None
        if width := shape.shared_expert_intermediate_size:
            self.shared = GatedMlp(shape.hidden_size, width, place=place, what="shared_expert_intermediate_size")

    def forward(
        self, x_TD: Tensor | None, residual_TD: Tensor, batch: AttentionBatch, *, norm: RmsNorm
    ) -> tuple[Tensor, Tensor]:
        """The whole output for the norm of x + residual, and that sum; equal on all ranks."""
        x_TD, residual_TD = norm.after_adding(x_TD, residual_TD)
        weights_TA, ids_TA = route(
            self.router(x_TD), self.num_chosen, normalised=self.normalised, slot_mapping_T=batch.slot_mapping_T
        )
        out_TD = self.experts(x_TD, weights_TA, ids_TA)
        if self.shared is not None:
            shared_TD = self.shared.partial(x_TD)
            out_TD = out_TD + (
                shared_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * shared_TD
            )
        return self.group.all_reduce(out_TD), residual_TD


class Experts(nn.Module):
    """The routed experts of one rank, or its slices of them."""

    def __init__(self, hidden_size: int, width: int, num_experts: int, place: Placement) -> None:
        super().__init__()
        shard = place.shard
        held = slice_of(num_experts, shard.ep_size, shard.ep_rank, what="the number of experts")
        cut = slice_of(width, shard.expert_tp_size, shard.expert_tp_rank, what="moe_intermediate_size")
        self.num_experts, self.first, held_width = num_experts, held.start, cut.stop - cut.start
        numbers = range(held.start, held.stop)
        whole, sizes = slice(0, hidden_size), (width, hidden_size)
        self.gate_up = Stack(place, (len(numbers), 2 * held_width, hidden_size), [
            Part(f"{expert}.{name}", sizes, (cut, whole), (index, slice(first, first + held_width)))
            for index, expert in enumerate(numbers)
            for name, first in (("gate", 0), ("up", held_width))
        ])  # fmt: skip
        self.down = Stack(place, (len(numbers), hidden_size, held_width), [
            Part(str(expert), sizes[::-1], (whole, cut), (index,)) for index, expert in enumerate(numbers)
        ])  # fmt: skip

    def forward(self, x_TD: Tensor, weights_TA: Tensor, ids_TA: Tensor) -> Tensor:
        """This rank's addend of the experts' output."""
        return experts(
            x_TD,
            self.gate_up.weight,
            self.down.weight,
            weights_TA,
            ids_TA,
            first_expert=self.first,
            num_experts=self.num_experts,
        )


class Stack(Sharded):
    """One matrix per expert."""

    weight: Tensor

    def __init__(self, place: Placement, shape: tuple[int, ...], parts: list[Part]) -> None:
        super().__init__(place)
        self.add("weight", shape, parts)
