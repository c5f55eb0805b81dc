"""Several runs side by side: `compare.html`, `compare.json` and `compare.csv`."""

from __future__ import annotations

import csv
from html import escape
from typing import TYPE_CHECKING, Any

from gllm.report.comparison_plots import comparison_charts
from gllm.report.files import replacing
from gllm.report.metrics import plain
from gllm.report.page import card, document, header, headline, table
from gllm.report.rows import COMPARED, MISSING, best
from gllm.report.write import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gllm.report.rows import Row, Summary

NOT_COLUMNS = ("config", "stages")

HEADLINES = {
    "Lowest TTFT, p99": ("ttft_s", "p99"),
    "Lowest TPOT, mean": ("tpot_s", "mean"),
    "Most output tokens/s": ("output_tokens_per_s",),
    "Smallest bubble share": ("bubble_fraction",),
}


def write_comparison(
    directory: Path, runs: Sequence[Mapping[str, Any]], *, title: str = "Policy comparison"
) -> dict[str, Any]:
    """Write the comparison of summaries and return the contents of compare.json.

    Each run is a summary (see `summarize`) with two more keys: `policy`, its name, and `rate_per_s`,
    the offered requests per second (None when all requests arrive at once).
    Raises ValueError when a key is missing, a pair occurs twice, or only some runs have a rate.
    """
    check_runs(runs)
    ordered = sorted(map(plain, runs), key=lambda run: run["rate_per_s"] or 0.0)
    contents = {"title": title, "runs": ordered}
    write_json(directory / "compare.json", contents)
    rows = [dict(_scalars(run)) for run in ordered]
    with replacing(directory / "compare.csv") as file:
        names = list(dict.fromkeys(["policy", "rate_per_s", *(name for row in rows for name in row)]))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(directory / "compare.html") as file:
        file.write(comparison_page(ordered, title))
    return contents


def check_runs(runs: Sequence[Summary]) -> None:
    """Raise ValueError for runs that cannot be set side by side."""
    if not runs:
        raise ValueError("nothing to compare: no run given")
    for run in runs:
        if missing := {"policy", "rate_per_s"} - run.keys():
            raise ValueError(f"a compared run lacks {' and '.join(sorted(missing))}")
    keys = [(run["policy"], run["rate_per_s"]) for run in runs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"policy {twice[0]!r} occurs twice at rate {twice[1]}")
    if len({rate is None for _, rate in keys}) > 1:
        raise ValueError("either every compared run has a rate or none has")


def by_rate(runs: Sequence[Summary]) -> dict[float | None, list[Summary]]:
    """Runs that met the same traffic, in order of rate."""
    groups: dict[float | None, list[Summary]] = {}
    for run in sorted(runs, key=lambda run: run["rate_per_s"] or 0.0):
        groups.setdefault(run["rate_per_s"], []).append(run)
    return groups


def comparison_page(runs: Sequence[Summary], title: str) -> str:
    """The page of runs that `check_runs` let pass."""
    groups = by_rate(runs)
    charts = (card(chart) for chart in comparison_charts(runs))
    rate, busiest = list(groups.items())[-1]
    tables = (_table(at, group, unfolded=at == rate) for at, group in groups.items())
    body = [
        header(f"{_common_mode(runs)} runs", title, _common_facts(runs)),
        _tiles(rate, busiest),
        '<div class="grid">',
        *charts,
        *tables,
        "</div>",
    ]
    return document(title, "\n".join(body))


def traffic_name(rate: float | None) -> str:
    """How a request rate reads."""
    return "all at once" if rate is None else f"{rate:g} requests/s"


def _common_mode(runs: Sequence[Summary]) -> str:
    return " and ".join(sorted({str(run["mode"]) for run in runs}))


def _common_facts(runs: Sequence[Summary]) -> dict[str, str]:
    """What all runs share, and what tells them apart."""
    heads = [headline(run) for run in runs]
    shared = {key: value for key, value in heads[0].items() if all(head.get(key) == value for head in heads)}
    names = ", ".join(dict.fromkeys(str(run["policy"]) for run in runs))
    *others, last = by_rate(runs)
    rates = ", ".join((*(f"{rate:g}" for rate in others), traffic_name(last)))
    return {**shared, "policy": names, "load": rates}


def _tiles(rate: float | None, runs: Sequence[Summary]) -> str:
    """Who leads at the highest rate."""
    rows = {label: next(row for row in COMPARED if row.path == path) for label, path in HEADLINES.items()}
    tiles = (
        f'<div class="tile"><p>{escape(label)}</p><div class="figure">{_leader(row, runs)[0]}</div>'
        f"<p>{escape(_leader(row, runs)[1])}, {escape(traffic_name(rate))}</p></div>"
        for label, row in rows.items()
    )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _leader(row: Row, runs: Sequence[Summary]) -> tuple[str, str]:
    """Best value of a row and the policies that reached it."""
    known = [run for run in runs if row.value(run) is not None]
    if not known:
        return MISSING, "no run has it"
    top = best([row.value(run) for run in known], row.better)
    names = [str(known[index]["policy"]) for index in sorted(top)] or ["all alike"]
    return row.text(known[min(top, default=0)]), ", ".join(names)


def _table(rate: float | None, runs: Sequence[Summary], *, unfolded: bool) -> str:
    """Policies as columns, measures as rows, in a card that folds."""
    rows = [[escape(row.label), *_cells(row, runs)] for row in COMPARED]
    head = ("measure", *(str(run["policy"]) for run in runs))
    return (
        f'<section class="card wide"><details{" open" if unfolded else ""}>'
        f"<summary>Side by side, {escape(traffic_name(rate))}</summary>{table(head, rows)}"
        '<p class="note">A star marks the best value of its row.</p></details></section>'
    )


def _cells(row: Row, runs: Sequence[Summary]) -> Iterator[str]:
    top = best([row.value(run) for run in runs], row.better)
    for index, run in enumerate(runs):
        mark = ' class="best"' if index in top else ""
        yield f"<td{mark}>{row.text(run)}</td>"


def _scalars(value: Summary, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A summary as dotted column names and their values."""
    for key, item in value.items():
        if isinstance(item, dict) and key not in NOT_COLUMNS:
            yield from _scalars(item, f"{prefix}{key}.")
        elif not isinstance(item, (dict, list)):
            yield f"{prefix}{key}", item
