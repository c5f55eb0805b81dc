"""`fidelity.html`: both runs on one page that opens offline."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from gllm.report.page import card, document, header, headline, table
from gllm.report.twin_plots import latency_chart, stage_error_chart, stage_time_chart, token_chart
from gllm.sim.fidelity.stages import KINDS
from gllm.sim.fidelity.tables import STAGE_TABLES, decision_lines, metric_tables

if TYPE_CHECKING:
    from gllm.report.style import Chart
    from gllm.sim.fidelity.compare import Comparison
    from gllm.sim.fidelity.tables import Table

TILES = ("TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99", "E2E mean", "output tokens/s", "duration", "iterations")


def fidelity_page(found: Comparison) -> str:
    """The whole page."""
    facts = headline(found.runs[0].summary)
    name = facts.pop("model", "gLLM run")
    facts |= {"simulated with": found.simulated_with}
    runs = {"measured": found.runs[0].record, "simulated": found.record}
    body = [
        header("fidelity", f"{name}, measured and simulated", facts),
        _tiles(found),
        '<div class="grid">',
        _decisions(found),
        card(latency_chart(runs)),
        card(token_chart(runs)),
        *(_table(which, found) for which in metric_tables(found)),
        *map(card, _stage_charts(found)),
        *(_table(which, found) for which in STAGE_TABLES),
        "</div>",
    ]
    return document(f"fidelity: {name}", "\n".join(body))


def _tiles(found: Comparison) -> str:
    """The errors that most readers came for."""
    rows = {metric.label: metric.cells() for metric in found.metrics}
    tiles = (
        f'<div class="tile"><p>{escape(label)}</p><div class="figure">{escape(rows[label][3])}</div>'
        f"<p>{escape(rows[label][2])}, measured {escape(rows[label][1])}</p></div>"
        for label in TILES
    )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _decisions(found: Comparison) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in decision_lines(found))
    return f'<section class="card wide"><h2>Decisions</h2>{lines}</section>'


def _table(which: Table, found: Comparison) -> str:
    rows = [[escape(first), *(f"<td>{escape(cell)}</td>" for cell in rest)] for first, *rest in which.rows(found)]
    return (
        f'<section class="card wide"><h2>{escape(which.title)}</h2>{table(which.head, rows)}'
        f'<p class="note">{escape(which.note)}</p></section>'
    )


def _stage_charts(found: Comparison) -> list[Chart]:
    record, predictions = found.runs[0].record, found.predictions
    size = min(record.batches.size, predictions.num_plans)
    measured = (record.stage_end_ns - record.stage_start_ns)[:size]
    kinds = np.array(predictions.kinds[:size], dtype=np.int64)
    charts = (stage_time_chart, stage_error_chart)
    return [chart(predictions.stage_ns[:size], measured, kinds, KINDS) for chart in charts]
