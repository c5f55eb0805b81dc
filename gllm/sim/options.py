"""The simulator's own options, and the configuration they make. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.options import add_parallel_options, parallel_options, positive, trace_options, whole

if TYPE_CHECKING:
    import argparse
    from dataclasses import Field

    from gllm.sim.config import SimConfig
    from gllm.sim.constants import RooflineConstants

DEFAULT_STAGES = 4
DEFAULT_REPLICAS = 20
LEAST_REPLICAS = 19
"""Between the least and the largest of so many values 9 of 10 further ones fall."""


def rates(text: str) -> list[float]:
    """`1,2,4`."""
    return [positive(part) for part in text.split(",")]


def split_policies(texts: list[str]) -> list[str]:
    """Policy specs from text where commas part both specs and one spec's options.

    Specs may also be parted by spaces or semicolons. After a comma `key=value` goes on with the
    options of the spec before it; anything else begins a new one.
    """
    specs: list[str] = []
    for text in " ".join(texts).replace(";", " ").split():
        head = len(specs)
        for part in filter(None, text.split(",")):
            if len(specs) > head and "=" in part.partition(":")[0]:
                specs[-1] += f",{part}"
            else:
                specs.append(part)
    return specs


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What serves the trace."""
    group = parser.add_argument_group("model and hardware")
    group.add_argument(
        "--model", default="qwen3-32b", help="a name (see models), a folder with a config.json, or such a file"
    )
    group.add_argument("--gpu", default="h200", help="see gpus (default: h200)")
    add_parallel_options(group, DEFAULT_STAGES)
    group.add_argument(
        "--profile",
        default="auto",
        metavar="FILE|auto|none",
        help="times measured on GPUs: a file, or a name of those listed by profiles; "
        "auto: the one of this model and GPU, else a roofline; none: a roofline (default: auto)",
    )
    group.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="constants of the roofline, such as host_ns=500000; with it, auto is none",
    )


def add_jobs(parser: argparse._ActionsContainer, what: str) -> None:
    """How many processes there are."""
    parser.add_argument("--jobs", type=whole(1), metavar="N", help=f"{what} at once; default: one a core")


def num_jobs(args: argparse.Namespace) -> int:
    """As many as asked for, or as there are cores."""
    import os  # noqa: PLC0415

    return args.jobs or os.cpu_count() or 1


def sim_config(args: argparse.Namespace, policy: str) -> SimConfig:
    """The run that a command line asks for, under one policy."""
    from gllm.sim.config import SimConfig  # noqa: PLC0415

    return SimConfig(
        model=args.model,
        gpu=args.gpu,
        parallel=parallel_options(args, DEFAULT_STAGES),
        policy=policy,
        max_num_seqs=args.max_num_seqs,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        num_blocks=args.num_blocks,
        max_in_flight=args.max_in_flight,
        gpu_memory_utilization=args.gpu_memory_utilization,
        prefix_caching=args.prefix_caching,
        profile=args.profile,
        constants=cost_constants(args.cost),
        slo_ttft_s=args.slo_ttft,
        slo_tpot_s=args.slo_tpot,
        trace=trace_options(args),
    )


def cost_constants(texts: list[str]) -> RooflineConstants:
    """The cost model's constants with `key=value` pairs laid over the defaults.

    Raises:
        ValueError: An unknown key, which lists those that exist, or a bad value.
    """
    from dataclasses import fields  # noqa: PLC0415

    from gllm.sim.constants import RooflineConstants  # noqa: PLC0415

    known = {field.name: field for field in fields(RooflineConstants)}
    values: dict[str, float] = {}
    for part in filter(None, ",".join(texts).split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise ValueError(f"--cost {part}: unknown constant; known: {', '.join(known)}")
        values[key] = _constant(known[key], text)
    return RooflineConstants(**values)  # type: ignore[arg-type]


def _constant(field: Field[float], text: str) -> float:
    kind = int if isinstance(field.default, int) else float
    is_share = field.name.endswith("_efficiency")
    try:
        value = kind(text)
    except ValueError:
        value = kind(-1)
    if not (0 < value <= 1 if is_share else 0 <= value <= 10**12):
        number = "a whole number" if kind is int else "a number"
        wanted = "a share of the peak, above 0 and at most 1" if is_share else f"{number}, 0 to 10^12"
        raise ValueError(f"--cost {field.name}={text}: must be {wanted}")
    return value
