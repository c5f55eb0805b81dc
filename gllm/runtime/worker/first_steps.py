"""The first steps of this node's stages on torch's meta device: the same operations and launches, and no data."""

from __future__ import annotations

import struct
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from gllm_kernels import jit
from gllm_kernels.all_reduce import MAX_RANKS, Peers, all_reduce, make_peers, takes
from gllm_kernels.few_rows import MAX_ROWS

from gllm.policy import parse_policy
from gllm.runtime.messages import Admission, ChunkWork, Step
from gllm.runtime.models import MODELS
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.shard import Communicator, Shard, SoloCommunicator
from gllm.runtime.worker import stage as stages
from gllm.runtime.worker.groups import Neighbours
from gllm.runtime.worker.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from gllm.model_shape import ModelShape
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.model_config import ModelConfig

META = torch.device("meta")
_MANY_BLOCKS = 1 << 16


def take_first_steps(config: RuntimeConfig) -> None:
    """Go through what each of this node's workers does first, once for those that do the same.

    For a process that does nothing else: for the time being it has no device but this one.
    """
    model = config.check()
    limits = config.limits(_MANY_BLOCKS)
    max_tokens = parse_policy(config.policy).max_batch_tokens(limits)
    with without_device():
        for shard in local_shards(config, model.shape):
            stage = make_stage(config, model, shard)
            stage.rehearse(max_tokens)
            if config.cuda_graphs:
                stage.capture(max_tokens)
            for step in first_steps(config.block_size, limits.max_model_len, limits.max_num_seqs):
                stage.run(step)


class _NoGraphs:
    """Stands for a pool of CUDA graphs, and for each of them: what it would capture is launched once, and not again."""

    def capture(self, work: Callable[[], object]) -> _NoGraphs:
        work()
        return self

    def replay(self) -> None:
        """Nothing."""


_make, _from_numpy = torch.tensor, torch.from_numpy
_STAND_INS: tuple[tuple[Any, str, object], ...] = (
    (jit, "META_RUNS_TRITON", True),
    (torch, "tensor", lambda *args, **options: _make(*args, **options).to(META)),  # the host's are there at once
    (torch, "from_numpy", lambda array: _from_numpy(array).to(META)),
    (stages, "GraphPool", _NoGraphs),
)


@contextmanager
def without_device() -> Iterator[None]:
    """For the time being, what is on its way to a device is there, and nothing is captured."""
    kept = [getattr(module, name) for module, name, _ in _STAND_INS]
    for module, name, stand_in in _STAND_INS:
        setattr(module, name, stand_in)
    try:
        with _without_dynamo():
            yield
    finally:
        for (module, name, _), its_own in zip(_STAND_INS, kept, strict=True):
            setattr(module, name, its_own)


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Spare the import of torch's compiler, which takes a second: what torch does on the meta device is hidden from it.

    Nobody compiles that here. A function remembers how it was hidden, and has to forget it for who comes later.
    """
    name = "torch._dynamo"
    hidden: list[Any] = []

    def disable(function: Any, *_: object, **__: object) -> Any:  # noqa: ANN401 - any function
        hidden.append(function)
        return function

    stand_in: Any = SimpleNamespace(disable=disable)
    if sys.modules.setdefault(name, stand_in) is not stand_in:
        yield  # it is imported already
        return
    try:
        yield
    finally:
        del sys.modules[name]
        for function in hidden:
            vars(function).pop("__dynamo_disable", None)


def local_shards(config: RuntimeConfig, shape: ModelShape) -> list[Shard]:
    """One for each kind of rank on this node: ranks of a stage differ only in their weights."""
    parallel = config.parallel
    first = config.nodes.rank * config.num_local_workers
    shards: dict[object, Shard] = {}
    for rank in range(first, first + config.num_local_workers):
        stage, tp_rank = divmod(rank, parallel.tp)
        layers = _few(parallel.layers_of_stage(shape, stage), shape)
        is_first, is_last = stage == 0, stage == parallel.pp - 1
        kind = is_first, is_last, frozenset(layer in shape.moe_layers for layer in layers)
        shards.setdefault(kind, Shard(
            layers=layers,
            tp_rank=tp_rank,
            tp_size=parallel.tp,
            ep_size=parallel.ep,
            is_first=is_first,
            is_last=is_last,
            group=SoloCommunicator() if parallel.tp == 1 else _group(tp_rank, parallel.tp),
        ))  # fmt: skip
    return list(shards.values())


def _few(layers: range, shape: ModelShape) -> range:
    """The first layers, up to where both kinds are there that the stage has: with experts and without."""
    kinds = [layer in shape.moe_layers for layer in layers]
    return layers[: 1 + max(kinds.index(kind) for kind in set(kinds))]


def make_stage(config: RuntimeConfig, model: ModelConfig, shard: Shard) -> Stage:
    """A rank without data, whose neighbours take and give nothing."""
    dtype: torch.dtype = getattr(torch, model.dtype if config.dtype == "auto" else config.dtype)
    with torch.inference_mode():
        layers = MODELS[model.architecture](model, shard, dtype, META)
    edge: Any = _Edge()
    is_alone = shard.is_first and shard.is_last
    return Stage(
        layers.eval(),
        Neighbours(
            before=None if shard.is_first else edge,
            after=None if shard.is_last else edge,
            tokens=None if is_alone or not (shard.is_first or shard.is_last) else edge,
        ),
        stage=0,
        limits=config.limits(_MANY_BLOCKS),
        backend="triton" if config.attention_backend == "auto" else config.attention_backend,
        report=lambda _: None,
        keeps_time=False,
    )


def first_steps(block_size: int, max_model_len: int, max_num_seqs: int) -> Iterator[Step]:
    """Prompts, decodes, and both, as far as there are slots; plain rows, and one whose choices are filtered."""
    plain, filtered = SamplingParams(), SamplingParams(top_p=0.9)
    length = max(2, min(4 * block_size, max_model_len - 1))
    last = max_num_seqs - 1
    yield _step(0, prompts=[(0, length, plain)], block_size=block_size)
    yield _step(1, prompts=[(min(1, last), length - 1, filtered)], decodes=[0] if last else [], block_size=block_size)
    yield _step(2, decodes=[0, 1][: last + 1], block_size=block_size)
    # One row, few of them and twice as many, which kernels of their own multiply; elsewhere a graph does.
    yield _step(3, decodes=[0], block_size=block_size)
    yield _step(4, prompts=[(last, 2, plain)], block_size=block_size)
    yield _step(5, prompts=[(last, min(MAX_ROWS, max_model_len - 1), plain)], block_size=block_size)
    if last >= 3:
        yield _step(6, prompts=[(2, length, plain), (3, length - 1, plain)], decodes=[0, 1], block_size=block_size)


def _step(
    plan: int,
    *,
    prompts: Sequence[tuple[int, int, SamplingParams]] = (),
    decodes: Sequence[int] = (),
    block_size: int,
) -> Step:
    """Whole prompts of new sequences (slot, tokens, parameters) after the decodes of slots, which get a block each."""
    return Step(
        plan=plan,
        admissions=[Admission(slot, [0] * num, num, params, 0, []) for slot, num, params in prompts],
        chunks=[ChunkWork(slot, 0, num, final=True, blocks=[0] * -(-num // block_size)) for slot, num, _ in prompts],
        num_decodes=len(decodes),
        decode_slots=struct.pack(f"{len(decodes)}i", *decodes),
        grown=[(slot, 0) for slot in decodes],
        depends_on=plan - 1,
    )


class _Edge:
    """Stands for a way to another rank."""

    def send(self, tensor: Tensor) -> None:
        """Nobody is there."""

    def receive(self, tensor: Tensor) -> Tensor:
        """As if it had come."""
        return tensor


@dataclass(frozen=True, slots=True)
class _Group:
    """Stands for the ranks of a stage; with shared memory, as they mostly have."""

    rank: int
    size: int
    peers: Peers | None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.peers is not None and takes(tensor, self.size):
            all_reduce(tensor, self.peers)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty((*tensor.shape[:-1], self.size * tensor.shape[-1]))


def _group(rank: int, size: int) -> Communicator:
    return _Group(rank, size, make_peers([0] * size, rank, META) if size <= MAX_RANKS else None)
