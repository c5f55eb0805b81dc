"""A cost model whose times a reader can work out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.sim.cost import COMPONENTS

if TYPE_CHECKING:
    from gllm.sim.cost import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedCost:
    """A stage takes `batch_ns` and `token_ns` for each token, all stages alike: for tests and reasoning."""

    num_stages: int = 1
    batch_ns: int = 1_000_000
    token_ns: int = 0
    hop_ns: int = 0
    between_ns: int = 0
    intake_ns: int = 0
    host_ns: int = 0
    return_ns: int = 0

    def stage_ns(self, work: Work) -> tuple[int, ...]:
        """How long each stage computes."""
        tokens = work.num_prefill_tokens + work.num_decode_tokens
        return (self.batch_ns + self.token_ns * tokens,) * self.num_stages

    clock = None

    def load(self, work: Work) -> None:
        """Nothing: there is no clock."""

    def transfer_ns(self, work: Work) -> int:  # noqa: ARG002 - a hop takes the same for any work
        """How long a hop between stages takes; zero with a single stage."""
        return self.hop_ns if self.num_stages > 1 else 0

    def gap_ns(self, work: Work) -> int:  # noqa: ARG002 - the same for any work
        """How long a stage needs between two micro-batches."""
        return self.between_ns

    def components(self, work: Work) -> dict[str, tuple[float, ...]]:
        """Everything counts as `gemm`."""
        nothing = (0.0,) * self.num_stages
        return {name: tuple(map(float, self.stage_ns(work))) if name == "gemm" else nothing for name in COMPONENTS}
