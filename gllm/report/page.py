"""`report.html`: one run on one page that opens offline."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from gllm.report.plots import run_charts
from gllm.report.rows import (
    LATENCIES,
    SECTIONS,
    STATISTICS,
    bounds,
    intervals_note,
    lookup,
    seconds,
    show,
    show_bounds,
)
from gllm.report.style import CSS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gllm.report.record import RunRecord
    from gllm.report.rows import Summary
    from gllm.report.style import Chart

FACTS = {
    "model": ("model",),
    "GPUs": ("gpus", "gpu", "hardware", "device"),
    "policy": ("policy",),
    "trace": ("trace", "workload"),
}
"""Header fields and the configuration keys they are read from, first hit wins."""


def run_page(record: RunRecord, summary: Summary) -> str:
    """The whole page; `summary` is this record's own."""
    facts = headline(summary)
    parts = [
        header(f"{summary['mode']} run", facts.pop("model", "gLLM run"), facts),
        tiles(summary),
        '<div class="grid">',
        _latency(summary),
        _measures(summary),
        *(card(chart) for chart in run_charts(record, summary)),
        _folded(summary),
        "</div>",
    ]
    return document(f"{summary['mode']} run", "\n".join(parts))


def headline(summary: Summary) -> dict[str, str]:
    """What ran, as far as the configuration names it."""
    config = summary["config"]
    found = {name: next((config[key] for key in keys if config.get(key)), None) for name, keys in FACTS.items()}
    facts = {name: _name(value) for name, value in found.items() if value is not None}
    return {**facts, "stages": str(len(summary["stages"]))} if summary["stages"] else facts


def document(title: str, body: str) -> str:
    """Wrap a page's body; everything it needs is inside."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · gLLM</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, facts: Mapping[str, str]) -> str:
    """The page's head: what kind, what, and with what."""
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1><dl class="facts">{pairs}</dl></header>'
    )


def tiles(summary: Summary) -> str:
    """The eight figures most readers came for."""
    drawn = (
        f'<div class="tile"><p>{escape(label)}</p><div class="figure">{value}</div><p>{escape(below)}</p></div>'
        for label, value, below in _tiles(summary)
    )
    return f'<section class="tiles">{"".join(drawn)}</section>'


def card(chart: Chart) -> str:
    """One plot with its title above and its explanation beneath."""
    body = chart.svg.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)
    body = body or '<p class="empty">Nothing to draw.</p>'
    kind = "card wide" if chart.wide else "card"
    title, note = escape(chart.title), escape(chart.note)
    return f'<section class="{kind}"><h2>{title}</h2>{body}<p class="note">{note}</p></section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready-made cells: the first of a row is bare escaped text, the others are whole `td` elements."""
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr><th>{first}</th>{''.join(rest)}</tr>" for first, *rest in rows)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def latency_rows(summary: Summary) -> Iterator[list[str]]:
    """One row a latency, one cell a statistic, with its interval where there is one."""
    for name, key in LATENCIES.items():
        paths = [(key, statistic) for statistic in STATISTICS]
        yield [
            escape(name),
            *(f"<td>{show(lookup(summary, path), 's')}{_bounds(summary, path, 's')}</td>" for path in paths),
        ]


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - any JSON value
    """Nested configuration as dotted names and their values."""
    if hasattr(config, "items") and config:
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _name(config) if isinstance(config, list) else str(config)


def _latency(summary: Summary) -> str:
    note = intervals_note(summary)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<section class="card wide"><h2>Latency</h2>{table(("", *STATISTICS), latency_rows(summary))}{below}</section>'
    )


def _measures(summary: Summary) -> str:
    """Single-valued measures in one column a section."""
    columns = []
    for name, rows in SECTIONS.items():
        pairs = "".join(
            f"<div><dt>{escape(row.label)}</dt><dd>{row.text(summary)}{_bounds(summary, row.path, row.unit)}</dd></div>"
            for row in rows
        )
        columns.append(f"<div><h3>{escape(name)}</h3><dl>{pairs}</dl></div>")
    return f'<section class="card wide measures">{"".join(columns)}</section>'


def _bounds(summary: Summary, path: Sequence[str], unit: str) -> str:
    """A measure's interval, beneath it."""
    text = show_bounds(bounds(summary, path), unit)
    return f'<span class="bounds">{escape(text)}</span>' if text else ""


def _tiles(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Label, figure (as HTML) and a line beneath."""

    def text(*path: str, unit: str) -> str:
        return show(lookup(summary, path), unit)

    def small(value: str, unit: str) -> str:
        return f"{value} <small>{unit}</small>"

    finished = small(text("num_finished", unit="count"), f"of {summary['num_requests']:,}")
    goodput = text("goodput", "attainment", unit="share")
    yield "Requests finished", finished, f"in {seconds(summary['duration_s'])}"
    yield (
        "Output",
        small(text("output_tokens_per_s", unit="rate"), "tokens/s"),
        f"{text('total_tokens_per_s', unit='rate')} with prompts",
    )
    yield "Requests", small(text("requests_per_s", unit="rate"), "per s"), _objectives(summary, goodput)
    yield "Pipeline bubbles", text("bubble_fraction", unit="share"), "of the time with work in the system"
    for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s")):
        yield f"{name}, median", text(key, "p50", unit="s"), f"p99 {text(key, 'p99', unit='s')}"
    yield "KV cache, peak", text("kv_use", "peak", unit="share"), f"mean {text('kv_use', 'mean', unit='share')}"


def _objectives(summary: Summary, attainment: str) -> str:
    """How many requests met which objectives."""
    names = {"TTFT": summary["goodput"]["slo_ttft_s"], "TPOT": summary["goodput"]["slo_tpot_s"]}
    given = " and ".join(f"{name} ≤ {seconds(value)}" for name, value in names.items() if value is not None)
    return f"{attainment} within {given}" if given else "no objective set"


def _folded(summary: Summary) -> str:
    """The configuration and the decision log's digest, folded away."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in flatten(summary["config"])
    )
    digest = summary["decision_sha256"]
    line = f"Decisions SHA-256 <code>{escape(digest)}</code>" if digest else "The decision log was off."
    return (
        f'<section class="card wide"><details><summary>Configuration</summary><table class="config"><tbody>{rows}'
        f'</tbody></table></details><p class="note">{line}</p></section>'
    )


def _name(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """A short name for a configured thing: its `name` or `kind` where it has one."""
    if isinstance(value, list):
        return ", ".join(map(_name, value)) or "none"
    if hasattr(value, "get"):
        return str(value.get("name") or value.get("kind") or ", ".join(f"{key} {item}" for key, item in value.items()))
    return str(value)
