"""The comparison as lines and tables, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gllm.report.rows import MISSING, seconds
from gllm.sim.cost import COMPONENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.table import Table as RichTable

    from gllm.sim.fidelity.compare import Comparison
    from gllm.sim.fidelity.stages import StageError, WaitError


_SURE = 0.02
"""Of a factor: the standard error below which it is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Callable[[Comparison], Iterable[tuple[str, ...]]]


def summary_lines(found: Comparison) -> Iterator[str]:
    """What was compared, and what came of the decisions."""
    config = found.runs[0].record.config
    yield f"{found.runs[0].folder}: {config.get('model')} on {config.get('gpus')}, {config.get('policy')}"
    yield f"simulated with {found.simulated_with}"
    yield from decision_lines(found)
    failed = [metric.label for metric in found.metrics if metric.passes is False]
    yield f"outside the bar: {'; '.join(failed)}" if failed else "every metric that is judged is within its bar"
    if found.intervals is not None:
        num_inside, num_known = found.num_inside
        yield f"measured values inside their 90 % intervals: {num_inside} of {num_known}"


def decision_lines(found: Comparison) -> Iterator[str]:
    """One line a step."""
    queued, free = found.queued, found.free
    if queued.why_not is not None:
        yield f"decisions without times: not applicable: {queued.why_not}"
    else:
        verdict = "equal" if queued.is_equal else f"differ: recorded {queued.recorded}, simulated"
        yield f"decisions without times: {verdict}, SHA-256 {queued.simulated}"
    for each in found.injected:
        name = f" ({each.run})" if len(found.injected) > 1 else ""
        if each.is_equal:
            verdict = f"equal, {each.num_decisions:,} of them"
        else:
            failure = "" if each.failure is None else f"; the simulated engine failed: {each.failure}"
            verdict = f"turn {each.turn:,} differs in {', '.join(each.differs_in)}{failure}; --decisions shows it"
        yield f"decisions on recorded times{name}: {verdict}"
    if free.first_difference is None:
        yield f"decisions running free: equal, {free.num_recorded:,} of them"
    else:
        same = free.num_same_chunks / free.num_requests
        yield (
            f"decisions running free: part at {free.first_difference:,} of {free.num_recorded:,} "
            f"(simulated {free.num_simulated:,}); {same:.1%} of the requests got the same chunks"
        )


def metric_tables(found: Comparison) -> tuple[Table, ...]:
    """All metrics, then their prediction intervals if there are any."""
    return (METRICS,) if found.intervals is None else (METRICS, INTERVALS)


def terminal_table(table: Table, found: Comparison) -> RichTable:
    """As rich prints it."""
    from rich import box  # noqa: PLC0415 - the command line starts without it
    from rich.table import Table as RichTable  # noqa: PLC0415

    drawn = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_style="bold", caption=table.note)
    for number, head in enumerate(table.head):
        drawn.add_column(head, justify="left" if number == 0 else "right", style="cyan" if number == 0 else "")
    for row in table.rows(found):
        drawn.add_row(*row)
    return drawn


def _stage_cells(row: StageError) -> tuple[str, ...]:
    return (
        f"{row.stage}, {row.kind}",
        f"{row.num_batches:,}",
        f"{row.share:.1%}",
        seconds(row.measured_s),
        seconds(row.predicted_s),
        _percent(row.error, "+"),
        _percent(row.absolute_error, ""),
    )


def _part_cells(row: StageError) -> tuple[str, ...]:
    return (f"{row.stage}, {row.kind}", *(_part_cell(row, name) for name in COMPONENTS))


def _part_cell(row: StageError, name: str) -> str:
    time_s, factor = row.components_s.get(name), row.factors.get(name)
    if time_s is None:
        return MISSING
    if factor is None or factor.standard_error >= _SURE:
        return seconds(time_s)
    return f"{seconds(time_s)} x{factor.value:.2f}"


def _wait_cells(row: WaitError) -> tuple[str, ...]:
    times = (_ns(time_ns) for time_ns in (row.measured_ns, row.predicted_ns, row.difference_ns))
    return (row.name, f"{row.num_samples:,}", *times)


def _percent(value: float | None, sign: str) -> str:
    return MISSING if value is None else f"{value:{sign}.2f} %"


def _ns(time_ns: float | None) -> str:
    return MISSING if time_ns is None else seconds(time_ns / 1e9)


METRICS = Table(
    title="Metrics",
    note="error: simulated less measured; spread: largest less smallest of several measured runs",
    head=("metric", "measured", "simulated", "error", "spread", "within"),
    rows=lambda found: (metric.cells() for metric in found.metrics),
)
INTERVALS = Table(
    title="Prediction intervals",
    note="where the simulator expects the measured value in 9 of 10 cases, going by the profile's checks",
    head=("metric", "measured", "simulated", "90 % interval", "inside"),
    rows=lambda found: (metric.interval_cells() for metric in found.metrics if metric.interval is not None),
)
STAGES = Table(
    title="Stage times of the recorded micro-batches",
    note="error of the sum, and of each batch whatever its sign, in percent of the measured time",
    head=("stage", "batches", "share", "measured", "predicted", "error", "absolute"),
    rows=lambda found: map(_stage_cells, found.stages),
)
PARTS = Table(
    title="What the predictions consist of",
    note="sums over the same micro-batches, and times what they would fit the measured times best, "
    f"where these say so with a standard error below {_SURE}",
    head=("stage", *(name.replace("_", " ") for name in COMPONENTS)),
    rows=lambda found: map(_part_cells, found.stages),
)
WAITS = Table(
    title="Beside the stages",
    note="medians: transfer to a stage that waits, dispatch to an empty pipeline, return, gap between two steps",
    head=("time", "samples", "measured", "predicted", "off by"),
    rows=lambda found: map(_wait_cells, found.waits),
)
STAGE_TABLES = (STAGES, PARTS, WAITS)
