"""Micro-batches as plain values, and a cost model whose times a reader can work out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.sim.cost import COMPONENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.sim.cost import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """`Work` as a plain value."""

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    decode_context: int = 0
    num_sampled: int = 0


def batch_work(
    *,
    chunks: Iterable[tuple[int, int]] = (),
    contexts: Iterable[int] = (),
    num_sampled: int | None = None,
) -> BatchWork:
    """Sum up a micro-batch.

    Args:
        chunks: of each prefill chunk, the tokens before it and its own.
        contexts: of each decoding sequence, its length with the new token.
        num_sampled: rows through the head; by default every chunk and decode, as if each chunk ended its prompt.
    """
    parts, lengths = list(chunks), list(contexts)
    return BatchWork(
        num_prefill_tokens=sum(count for _, count in parts),
        num_decode_tokens=len(lengths),
        prefill_pairs=sum(count * start + count * (count + 1) // 2 for start, count in parts),
        prefill_context=sum(start + count for start, count in parts),
        decode_context=sum(lengths),
        num_sampled=len(parts) + len(lengths) if num_sampled is None else num_sampled,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedCost:
    """A stage takes `batch_ns` and `token_ns` for each token, all stages alike: for tests and reasoning."""

    num_stages: int = 1
    batch_ns: int = 1_000_000
    token_ns: int = 0
    hop_ns: int = 0
    host_ns: int = 0
    return_ns: int = 0

    def stage_ns(self, work: Work) -> tuple[int, ...]:
        """How long each stage computes."""
        tokens = work.num_prefill_tokens + work.num_decode_tokens
        return (self.batch_ns + self.token_ns * tokens,) * self.num_stages

    def transfer_ns(self, work: Work) -> int:  # noqa: ARG002 - a hop takes the same for any work
        """How long a hop between stages takes; zero with a single stage."""
        return self.hop_ns if self.num_stages > 1 else 0

    def components(self, work: Work) -> dict[str, tuple[float, ...]]:
        """Everything counts as `gemm`."""
        nothing = (0.0,) * self.num_stages
        return {name: tuple(map(float, self.stage_ns(work))) if name == "gemm" else nothing for name in COMPONENTS}
