"""The seam between the simulated pipeline and whatever knows how long a micro-batch takes.

A pipeline asks a `CostModel` for integer nanoseconds; the roofline and, later, a profile measured on hardware
answer. What a micro-batch costs depends on a few sums over its sequences, which are `Work`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMPONENTS = ("gemm", "prefill_attention", "decode_attention", "head", "all_reduce", "other", "launch")
"""Keys of `CostModel.components`. `launch` is the time a stage waits for its host to launch kernels."""


class Work(Protocol):
    """Sums over the sequences of one micro-batch; at least one token."""

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens computed, over all chunks."""

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that take one decode step."""

    @property
    def prefill_pairs(self) -> int:
        """Query-key pairs under the causal mask: for a chunk of n tokens after `start`, n*start + n*(n + 1)/2."""

    @property
    def prefill_context(self) -> int:
        """Tokens the chunks attend to: the sum of start + n."""

    @property
    def decode_context(self) -> int:
        """Tokens the decoding sequences attend to, the new one included."""

    @property
    def num_sampled(self) -> int:
        """Rows that go through the head: decodes, and chunks that end a prompt."""


class CostModel(Protocol):
    """Times of one micro-batch, in nanoseconds; the same work always costs the same."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""

    @property
    def host_ns(self) -> int:
        """From the engine's decision to the start of the first stage."""

    @property
    def return_ns(self) -> int:
        """From the end of the last stage until the engine knows the sampled tokens."""

    def stage_ns(self, work: Work) -> Sequence[int]:
        """How long each stage computes."""

    def transfer_ns(self, work: Work) -> int:
        """How long activations travel from one stage to the next; zero with a single stage."""

    def components(self, work: Work) -> Mapping[str, Sequence[float]]:
        """Split `stage_ns` by component: for each of `COMPONENTS` one value per stage. Not for hot paths."""
