"""`traces`, `models`, `gpus`, `profiles`, `policies`: what is known, in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.terminal import say, say_table

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence

    from gllm.sim.profile import Profile

_GIB, _MIB = 1 << 30, 1 << 20


def traces(_: Namespace) -> int:
    """Sample traces, then the formats of other files."""
    from gllm.trace import FORMATS, list_samples  # noqa: PLC0415 - each list imports what it needs

    _print(
        "Sample traces",
        ("name", ">requests", "description"),
        ((sample.name, f"{sample.num_requests:,}", sample.description) for sample in list_samples()),
    )
    _print(
        "Formats of trace files, zipped or not (told from the first line, or --format)",
        ("name", "columns or keys"),
        ((name, ", ".join(reader.needs)) for name, reader in FORMATS.items()),
    )
    return 0


def models(_: Namespace) -> int:
    """Model shapes known by name."""
    from gllm.model_shape import list_shapes, load_shape  # noqa: PLC0415

    shapes = map(load_shape, list_shapes())
    _print(
        "Models; a folder with a config.json, or such a file, serves as well",
        ("name", ">weights", ">layers", ">heads/KV", ">experts", ">KiB/token", ">length"),
        (
            (
                shape.name,
                f"{shape.total_params / 1e9:.1f} B",
                str(shape.num_layers),
                f"{shape.num_heads}/{shape.num_kv_heads}",
                f"{shape.num_experts_per_token} of {shape.num_experts}" if shape.is_moe else "",
                f"{shape.kv_bytes_per_token * shape.num_layers / 1024:,.0f}",
                f"{shape.max_position_embeddings:,}",
            )
            for shape in shapes
        ),
    )
    return 0


def gpus(_: Namespace) -> int:
    """GPUs known by name."""
    from gllm.sim.gpus import GPUS  # noqa: PLC0415

    _print(
        "GPUs",
        ("name", ">GiB", ">L2 MiB", ">GB/s", ">bf16 TFLOP/s", ">link GB/s", "source"),
        (
            (
                gpu.name,
                f"{gpu.memory_bytes / _GIB:.0f}",
                f"{gpu.l2_bytes / _MIB:.0f}",
                f"{gpu.bandwidth_bytes_per_s / 1e9:,.0f}",
                f"{gpu.bf16_flop_per_s / 1e12:,.0f}",
                f"{gpu.link_bytes_per_s / 1e9:.0f}",
                gpu.source,
            )
            for gpu in GPUS.values()
        ),
    )
    return 0


def profiles(_: Namespace) -> int:
    """Profiles that come with the package."""
    from gllm.sim.profile import list_profiles  # noqa: PLC0415

    found = list_profiles()
    if not found:
        say("no profiles come with this version; python -m gllm.runtime profile writes one, --profile FILE uses it")
        return 0
    columns = ("name", "model", "GPU", ">pp", ">tp", ">ep", "device", "date", "error over its checks")
    _print("Profiles: --profile NAME", columns, map(_profile_row, found))
    return 0


def _profile_row(profile: Profile) -> tuple[str, ...]:
    from gllm.sim.profiled import residuals  # noqa: PLC0415

    spread, found = profile.parallel, residuals(profile)
    return (
        profile.name,
        profile.shape.name,
        profile.gpu or "",
        *map(str, (spread.pp, spread.tp, spread.ep)),
        profile.device,
        profile.date,
        f"mean {found.mean:+.1%}, worst {found.worst:+.1%}" if found is not None else "none made",
    )


def policies(_: Namespace) -> int:
    """Policies with their options, then the waiting orders."""
    from gllm.policy import (  # noqa: PLC0415
        ORDERS,
        POLICIES,
        policy_options,
    )

    def options(name: str) -> str:
        return ", ".join(f"{key}={str(value).lower()}" for key, value in policy_options(POLICIES[name]()).items())

    _print(
        "Policies: --policy NAME[:key=value,...]",
        ("name", "what it does", "options and their defaults"),
        ((name, _first_line(make), options(name)) for name, make in POLICIES.items()),
    )
    _print(
        "Waiting orders: --policy NAME:order=...",
        ("name", "who goes first"),
        ((name, _first_line(order)) for name, order in ORDERS.items()),
    )
    return 0


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").partition("\n")[0]


def _print(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; a column whose name begins with > is set to the right."""
    from rich import box  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right or name == "name")
    for row in rows:
        table.add_row(*map(escape, row))
    say_table(table)
