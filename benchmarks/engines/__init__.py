"""The engines that are measured, behind one face: prompts as token ids in, numbers of generated tokens out.

Every engine gets random weights (unless told otherwise), bfloat16, no prefix cache, temperature 0.6 and no end of
sequence. Each is imported only when it is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gllm.console.errors import CommandError
from gllm.console.options import add_parallel_options, whole

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Self

    from gllm.model_shape import ModelShape

TEMPERATURE = 0.6
MAX_MODEL_LEN = 4096


class Home(NamedTuple):
    """Where an engine is: its module here, its class, the package whose version counts."""

    module: str
    name: str
    package: str


BACKENDS = {
    "gllm": Home("engines.gllm", "GllmEngine", "gllm"),
    "vllm": Home("engines.vllm", "VllmEngine", "vllm"),
    "transformers": Home("engines.transformers", "TransformersEngine", "transformers"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is started."""

    model: str  # a folder with a config.json
    shape: ModelShape
    pp: int = 1
    tp: int = 1
    ep: int = 1
    pp_layers: tuple[int, ...] | None = None
    policy: str = "throttle"  # gllm's own
    max_in_flight: int = 0  # gllm's own
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192
    max_model_len: int = MAX_MODEL_LEN
    gpu_memory_utilization: float = 0.9
    dtype: str = "bfloat16"
    load_format: str = "dummy"
    extra: Mapping[str, Any] = field(default_factory=dict)  # the engine's own options, by its own names


class Engine(Protocol):
    """A model, ready to answer."""

    def __init__(self, options: EngineOptions) -> None:
        """Start it.

        Raises:
            ValueError: the options do not fit it.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], num_outputs: Sequence[int]) -> list[int]:
        """Answer all prompts, which are there at once; how many tokens each answer came to."""
        ...

    def describe(self) -> dict[str, Any]:
        """How it runs, as JSON values: what it decided itself."""
        ...

    def close(self) -> None:
        """End it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def start(backend: str, options: EngineOptions) -> Engine:
    """The engine of that name.

    Raises:
        CommandError: it is not installed.
        ValueError: the options do not fit it.
    """
    home = BACKENDS[backend]
    try:
        engine: Engine = getattr(import_module(home.module), home.name)(options)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != home.package:
            raise
        raise CommandError(f"--backend {backend}: {error.name} is not installed in this Python") from None
    return engine


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """--backend."""
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="gllm", help="default: gllm")


def add_engine_arguments(parser: argparse.ArgumentParser, *, policy: str) -> None:
    """MODEL and how its engine is started."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder with config.json, or a shape's name; default: gLLM's own"
    )
    parser.set_defaults(backend="gllm")
    group = parser.add_argument_group("engine")
    add_parallel_options(group, 1)
    group.add_argument(
        "--policy", default=policy, metavar="P", help=f"gllm's: NAME[:key=value,...] (default: {policy})"
    )
    group.add_argument(
        "--max-in-flight", type=whole(0), default=0, metavar="N", help="gllm's micro-batches on the road"
    )
    group.add_argument(
        "--max-num-seqs", type=whole(1), default=512, metavar="N", help="sequences at once (default: 512)"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=whole(1),
        default=8192,
        metavar="N",
        help="tokens of a step; of gllm's policy unless that says so itself (default: 8192)",
    )
    group.add_argument(
        "--max-model-len", type=whole(2), default=MAX_MODEL_LEN, metavar="N", help=f"default: {MAX_MODEL_LEN}"
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: bfloat16"
    )
    group.add_argument(
        "--load-format", choices=("dummy", "auto"), default="dummy", help="default: dummy, random weights"
    )
    group.add_argument(
        "--engine-option",
        type=named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the engine's own: cuda_graphs=false, block_size=32 (vllm: enforce_eager=true); may be given again",
    )


def named_value(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def engine_options(args: argparse.Namespace, folder: str, shape: ModelShape) -> EngineOptions:
    """What `add_engine_arguments` were given.

    Raises:
        ValueError: they contradict each other, or the model.
    """
    pp = args.pp or len(args.pp_layers or ()) or 1
    if args.backend == "transformers" and (pp, args.tp) != (1, 1):
        raise ValueError("--backend transformers runs on one GPU; leave --pp and --tp out")
    if args.backend == "transformers" and args.engine_option:
        raise ValueError("--engine-option: transformers has none here")
    return EngineOptions(
        model=folder,
        shape=replace(shape, dtype_bytes=4 if args.dtype == "float32" else 2),
        pp=pp,
        tp=args.tp,
        ep=args.ep,
        pp_layers=args.pp_layers,
        policy=args.policy,
        max_in_flight=args.max_in_flight,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=min(args.max_model_len, shape.max_position_embeddings),
        gpu_memory_utilization=args.gpu_memory_utilization,
        dtype=args.dtype,
        load_format=args.load_format,
        extra=dict(args.engine_option),
    )
