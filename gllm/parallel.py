"""How a model is spread over GPUs: pipeline stages, tensor slices within a stage, experts within a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gllm.model_shape import ModelShape


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

    Layers are dealt evenly; if `pp` does not divide their number, the first stages take one more each, so the last
    one, which also holds the head, never has more than another. `pp_layers` overrides that.
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

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Number of layers of each stage."""
        if self.pp_layers is not None:
            return self.pp_layers
        share, rest = divmod(num_layers, self.pp)
        return tuple(share + (stage < rest) for stage in range(self.pp))

    def layers_of_stage(self, num_layers: int, stage: int) -> range:
        """Indices of the layers of one stage."""
        counts = self.layers_per_stage(num_layers)
        first = sum(counts[:stage])
        return range(first, first + counts[stage])

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        """What each stage of this model holds."""
        experts, last = frozenset(shape.moe_layers), self.pp - 1
        layers = [self.layers_of_stage(shape.num_layers, stage) for stage in range(self.pp)]
        num_moe = [sum(layer in experts for layer in part) for part in layers]
        return tuple(
            Stage(num_dense=len(part) - moe, num_moe=moe, is_first=stage == 0, is_last=stage == last)
            for stage, (part, moe) in enumerate(zip(layers, num_moe, strict=True))
        )

    def kv_heads_per_rank(self, shape: ModelShape) -> int:
        """KV heads one GPU holds; at least one."""
        return shape.kv_heads_on(self.tp)

    def attention_params_per_rank(self, shape: ModelShape) -> int:
        """Weights of one layer's q, k, v and o projections on one GPU, biases left out."""
        heads = 2 * shape.num_heads // self.tp + 2 * self.kv_heads_per_rank(shape)
        return shape.hidden_size * shape.head_dim * heads
