"""How a model is spread over GPUs: pipeline stages, tensor slices within a stage, experts within a stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gllm.model_shape import ModelShape

# The step for which pipelines are balanced: a busy pipeline's micro-batches hold chunks of prompts, too.
BALANCED_SEQUENCES = 64  # that decode, and pass the head
BALANCED_CONTEXT = 512  # cached tokens of each
BALANCED_TOKENS = 512  # of the whole step
TOKENS_PER_READ = 184
"""Tokens whose products with a weight take as long as reading it: 790 TFLOP/s over 4.3 TB/s, in bfloat16 (H200)."""


class Stage(NamedTuple):
    """What a stage holds: layers by kind, the embedding if it is first, the head if it is last."""

    num_dense: int
    num_moe: int
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        """Layers of both kinds."""
        return self.num_dense + self.num_moe


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """`pp` stages of `tp` GPUs each.

    Every projection of a layer is cut into `tp` slices. Experts are spread over `ep` groups of the stage's ranks and
    each expert is cut into `tp / ep` slices; ep 1 cuts every expert into tp slices. With fewer KV heads than ranks
    the heads are repeated, so that each rank holds one.

    Layers are dealt so that the slowest stage is as fast as can be, then the second slowest, and so on; the last
    stage also holds the head. Among equals the first stages have more. A stage's cost is a mixed step's: it reads its
    layers' weights (of experts those that some token is expected to visit) or, where that takes longer, computes
    with them, and it reads the cache; the head is for BALANCED_SEQUENCES tokens alone. The embedding is only looked
    up in. `pp_layers` overrides that.
    """

    pp: int = 1
    tp: int = 1
    ep: int = 1
    pp_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("pp", "tp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.tp % self.ep:
            raise ValueError(f"--ep {self.ep} does not divide --tp {self.tp}; experts spread over a stage's ranks")
        if self.pp_layers is not None and (len(self.pp_layers) != self.pp or min(self.pp_layers) < 1):
            raise ValueError(f"--pp-layers {self.pp_layers} must be {self.pp} positive numbers, one for each stage")

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.pp * self.tp

    def check(self, shape: ModelShape) -> None:
        """Raise unless this model can be spread so.

        Raises:
            ValueError: naming the option and the number of the model that it does not fit.
        """
        self._check_layers(shape)
        if shape.num_heads % self.tp:
            raise ValueError(f"--tp {self.tp} does not divide the {shape.num_heads} attention heads of {shape.name}")
        if shape.num_kv_heads % self.tp and self.tp % shape.num_kv_heads:
            raise ValueError(
                f"--tp {self.tp} neither divides nor is a multiple of the {shape.num_kv_heads} KV heads of {shape.name}"
            )
        if self.ep > 1 and not shape.is_moe:
            raise ValueError(f"--ep {self.ep}: {shape.name} has no experts; leave --ep out")
        if shape.is_moe and shape.num_experts % self.ep:
            raise ValueError(f"--ep {self.ep} does not divide the {shape.num_experts} experts of {shape.name}")
        self._check_widths(shape)

    def _check_layers(self, shape: ModelShape) -> None:
        if shape.num_layers < self.pp:
            raise ValueError(f"--pp {self.pp} is more than the {shape.num_layers} layers of {shape.name}")
        if self.pp_layers is not None and sum(self.pp_layers) != shape.num_layers:
            raise ValueError(f"--pp-layers add up to {sum(self.pp_layers)}; {shape.name} has {shape.num_layers} layers")

    def _check_widths(self, shape: ModelShape) -> None:
        if len(shape.moe_layers) < shape.num_layers and shape.intermediate_size % self.tp:
            raise ValueError(f"--tp {self.tp} does not divide intermediate_size {shape.intermediate_size}")
        if shape.is_moe and shape.moe_intermediate_size % (self.tp // self.ep):
            raise ValueError(
                f"--tp {self.tp} over --ep {self.ep} does not divide moe_intermediate_size "
                f"{shape.moe_intermediate_size}; raise --ep"
            )
        if shape.is_moe and shape.shared_expert_intermediate_size % self.tp:
            raise ValueError(
                f"--tp {self.tp} does not divide shared_expert_intermediate_size "
                f"{shape.shared_expert_intermediate_size}"
            )

    def layers_per_stage(self, shape: ModelShape) -> tuple[int, ...]:
        """Number of layers of each stage."""
        if self.pp_layers is not None:
            return self.pp_layers
        experts, dense = frozenset(shape.moe_layers), self._layer_cost(shape, is_moe=False)
        moe = self._layer_cost(shape, is_moe=True) if experts else 0
        costs = tuple(moe if layer in experts else dense for layer in range(shape.num_layers))
        return _balanced(costs, shape.embedding_params, self.pp)

    def _layer_cost(self, shape: ModelShape, *, is_moe: bool) -> int:
        """What one layer costs in the step to balance for, on all ranks together: numbers read, or as long as that."""
        always = shape.attention_params + shape.norm_params
        if is_moe:
            # An expert is missed by all tokens with the chance (1 - k/E)^T.
            total, missing = shape.num_experts, shape.num_experts - shape.num_experts_per_token
            visited = total**BALANCED_TOKENS - missing**BALANCED_TOKENS
            always += shape.shared_expert_params + shape.router_params
            read = always + int(total * shape.expert_params * visited // total**BALANCED_TOKENS)
            computed = always + shape.num_experts_per_token * shape.expert_params
        else:
            read = computed = always + shape.dense_mlp_params
        cached = 2 * self.kv_heads_per_rank(shape) * self.tp * shape.head_dim * BALANCED_CONTEXT * BALANCED_SEQUENCES
        return max(read, computed * BALANCED_TOKENS // TOKENS_PER_READ) + cached

    def layers_of_stage(self, shape: ModelShape, stage: int) -> range:
        """Indices of the layers of one stage."""
        counts = self.layers_per_stage(shape)
        first = sum(counts[:stage])
        return range(first, first + counts[stage])

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        """What each stage of this model holds."""
        experts, last = frozenset(shape.moe_layers), self.pp - 1
        layers = [self.layers_of_stage(shape, stage) for stage in range(self.pp)]
        num_moe = [sum(layer in experts for layer in part) for part in layers]
        return tuple(
            Stage(num_dense=len(part) - moe, num_moe=moe, is_first=stage == 0, is_last=stage == last)
            for stage, (part, moe) in enumerate(zip(layers, num_moe, strict=True))
        )

    def kv_heads_per_rank(self, shape: ModelShape) -> int:
        """KV heads one GPU holds; at least one."""
        return shape.kv_heads_on(self.tp)

    def kv_token_bytes(self, shape: ModelShape) -> int:
        """A token's keys and values of one layer on one GPU."""
        return 2 * self.kv_heads_per_rank(shape) * shape.head_dim * shape.dtype_bytes

    def attention_params_per_rank(self, shape: ModelShape) -> int:
        """Weights of one layer's q, k, v and o projections on one GPU, biases left out."""
        heads = 2 * shape.num_heads // self.tp + 2 * self.kv_heads_per_rank(shape)
        return shape.hidden_size * shape.head_dim * heads


class _Split(NamedTuple):
    """Layers dealt to some first stages. The least is best, and stays so whatever the same next stage adds to two."""

    costs: tuple[int, ...]  # of the stages, the slowest first
    minus_counts: tuple[int, ...]  # of layers, stage by stage: many come first


@cache
def _balanced(costs: tuple[int, ...], last_cost: int, num_stages: int) -> tuple[int, ...]:
    """How many layers each stage takes, at least one; `last_cost` is what the last stage has to do besides."""
    until = (0, *accumulate(costs))  # cost of all layers before
    num_layers = len(costs)
    best = {0: _Split((), ())}  # by number of layers dealt
    for later in reversed(range(num_stages)):
        extra = 0 if later else last_cost
        ends = range(1, num_layers - later + 1) if later else (num_layers,)
        best = {
            end: min(
                _Split(
                    tuple(sorted((*split.costs, until[end] - until[start] + extra), reverse=True)),
                    (*split.minus_counts, start - end),
                )
                for start, split in best.items()
                if start < end
            )
            for end in ends
            if min(best) < end
        }
    return tuple(-count for count in best[num_layers].minus_counts)
