"""The seam between the simulated pipeline and whatever knows how long a micro-batch takes.

A pipeline asks a `CostModel` for integer nanoseconds; the roofline and a profile measured on hardware answer. What a
micro-batch costs depends on its chunks and on a few sums over its sequences, which are `Work`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gllm.gpu_clock import GpuClock
    from gllm.model_shape import ModelShape
    from gllm.parallel import Parallel
    from gllm.sim.gpus import Gpu

COMPONENTS = ("gemm", "prefill_attention", "decode_attention", "head", "all_reduce", "other", "launch")
"""Keys of `CostModel.components`. `launch` is the time a stage waits for its host to launch kernels."""

L2_RATE = 1.5
"""The L2 cache gives keys so many times as fast as memory does: an assumption, on the careful side."""


class Chunk(Protocol):
    """Prompt tokens [start, start + num_tokens) of one sequence."""

    @property
    def start(self) -> int:
        """Tokens before it, which it attends to."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""


class Work(Protocol):
    """One micro-batch: its chunks, and sums over its sequences; at least one token."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """Prompt tokens computed, chunk by chunk."""

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
    def decode_repeats(self) -> int:
        """Of `decode_context`, tokens in blocks that other decoding sequences have, too, less one for each block."""

    @property
    def common_context(self) -> int:
        """Tokens in such blocks, each once."""

    @property
    def num_sampled(self) -> int:
        """Rows that go through the head: decodes, and chunks that end a prompt."""


class Load(NamedTuple):
    """A micro-batch as its stages' clocks see it (`gllm.gpu_clock`)."""

    stage_ns: list[int]  # as `CostModel.stage_ns`; a pipeline writes over it how long each stage took
    stretched_ns: Sequence[float]  # what the clock stretches of each
    power: float  # that it draws


class CostModel(Protocol):
    """Times of one micro-batch, in nanoseconds; the same work always costs the same, but for what its clock does."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""

    @property
    def intake_ns(self) -> int:
        """From a request's arrival until the engine knows of it."""

    @property
    def host_ns(self) -> int:
        """From the engine's decision to the start of the first stage."""

    @property
    def return_ns(self) -> int:
        """From the end of the last stage until the engine knows the sampled tokens."""

    def stage_ns(self, work: Work) -> Sequence[int]:
        """How long each stage computes."""

    @property
    def clock(self) -> GpuClock | None:
        """Of each stage; None: a stage takes what `stage_ns` says, whatever it computed before."""

    def load(self, work: Work) -> Load | None:
        """`stage_ns`, in a new list, and what the clock has to know of it; None without a clock."""

    def transfer_ns(self, work: Work) -> int:
        """How long activations travel from one stage to the next; zero with a single stage."""

    def gap_ns(self, work: Work) -> int:
        """How long a stage needs between the end of its last micro-batch and the start of this one, both there."""

    def components(self, work: Work) -> Mapping[str, Sequence[float]]:
        """Split `stage_ns` by component: for each of `COMPONENTS` one value per stage. Not for hot paths."""


class ChunkWork(NamedTuple):
    """`Chunk` as a plain value."""

    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """`Work` as a plain value."""

    chunks: tuple[ChunkWork, ...] = ()
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    decode_context: int = 0
    decode_repeats: int = 0
    common_context: int = 0
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
    parts, lengths = tuple(ChunkWork(*chunk) for chunk in chunks), list(contexts)
    return BatchWork(
        chunks=parts,
        num_prefill_tokens=sum(count for _, count in parts),
        num_decode_tokens=len(lengths),
        prefill_pairs=sum(count * start + count * (count + 1) // 2 for start, count in parts),
        prefill_context=sum(start + count for start, count in parts),
        decode_context=sum(lengths),
        num_sampled=len(parts) + len(lengths) if num_sampled is None else num_sampled,
    )


def tokens_from_memory(work: Work, kept_tokens: float) -> int:
    """How many tokens' keys from memory take as long as those that decodes attend to.

    A block of several sequences comes from memory once, as far as the L2 cache keeps it until the next one asks:
    `kept_tokens` of a layer. Meanwhile that gives the others theirs, at its own rate.
    """
    context = work.decode_context
    if not work.decode_repeats:
        return context
    share = min(1.0, kept_tokens / work.common_context)
    return max(context - int(share * work.decode_repeats), int(context / L2_RATE))


def kept_tokens(shape: ModelShape, gpu: Gpu, parallel: Parallel) -> float:
    """How many tokens' keys and values of a layer, on one rank, half of the L2 cache holds: the rest streams by."""
    return gpu.l2_bytes / 2 / parallel.kv_token_bytes(shape)
