"""Reports for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.report.rows import (
    COMPARED,
    LATENCIES,
    SECTIONS,
    STATISTICS,
    best,
    bounds,
    intervals_note,
    lookup,
    show,
    show_bounds,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from gllm.report.rows import Row, Summary


def run_table(summary: Summary, *, title: str | None = None) -> Table:
    """One run: traffic, latency, throughput, pipeline and cache in one frame, intervals where it has them."""
    from rich import box  # noqa: PLC0415 - the command line starts without it
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, box=box.ROUNDED, show_header=False, show_lines=True, title_style="bold")
    table.caption = intervals_note(summary) or None
    table.add_column(style="bold cyan", vertical="top")
    table.add_column()
    traffic, *others = SECTIONS.items()
    table.add_row(traffic[0], _pairs(traffic[1], summary))
    table.add_row("Latency", _latency(summary))
    for name, rows in others:
        table.add_row(name, _pairs(rows, summary))
    return table


def comparison_table(runs: Sequence[Summary], labels: Sequence[str], *, title: str | None = None) -> Table:
    """Several runs side by side, one column each; the best value of a row is bold green and starred."""
    from rich import box  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", caption="* best of its row")
    table.add_column("measure", style="cyan", no_wrap=True)
    for label in labels:
        table.add_column(escape(label), justify="right")
    for row in COMPARED:
        table.add_row(row.label, *_marked(row, runs))
    return table


def _pairs(rows: Sequence[Row], summary: Summary) -> Table:
    """Label and value, two such pairs to a line; with intervals one, and its interval."""
    from rich.table import Table  # noqa: PLC0415

    with_bounds = "intervals" in summary
    grid = Table.grid(padding=(0, 2))
    for _ in range(1 if with_bounds else 2):
        grid.add_column(style="dim", min_width=19)
        grid.add_column(justify="right", min_width=9)
    if with_bounds:
        for row in rows:
            grid.add_row(row.label, row.text(summary), show_bounds(bounds(summary, row.path), row.unit))
        return grid
    cells = [cell for row in rows for cell in (row.label, row.text(summary))]
    for start in range(0, len(cells), 4):
        grid.add_row(*cells[start : start + 4])
    return grid


def _latency(summary: Summary) -> Table:
    from rich.table import Table  # noqa: PLC0415

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=19)
    for _ in STATISTICS:
        grid.add_column(justify="right", min_width=9)
    grid.add_row("", *(f"[dim]{statistic}[/dim]" for statistic in STATISTICS))
    for name, key in LATENCIES.items():
        grid.add_row(name, *(show(lookup(summary, (key, statistic)), "s") for statistic in STATISTICS))
        pairs = [bounds(summary, (key, statistic)) for statistic in STATISTICS]
        for end, label in enumerate(("  from", "  to")) if any(pairs) else ():
            cells = ("" if pair is None else show(pair[end], "s") for pair in pairs)
            grid.add_row(label, *cells, style="dim")
    return grid


def _marked(row: Row, runs: Sequence[Summary]) -> list[str]:
    top = best([row.value(run) for run in runs], row.better)
    texts = [row.text(run) for run in runs]
    return [f"[bold green]*{text}[/]" if i in top else text for i, text in enumerate(texts)]
