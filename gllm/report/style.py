"""One look for every page: palette, matplotlib settings, style sheet."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, EDGE = "#1b2430", "#5f6b7a", "#e8ebf0", "#c9d0da"

# Okabe and Ito's palette, which stays apart under every common colour blindness.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, "#6b6b6b")
MARKERS = "osD^vPX"
PREFILL, DECODE, ENVELOPE = BLUE, ORANGE, "#aeb8c6"

FULL, HALF = 11.3, 5.5  # inches: a card across the page, a card across half of it

SETTINGS: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": EDGE,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",  # what matplotlib measures with; the page's own font draws the text
    "font.size": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.4,
    "path.simplify_threshold": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "gllm",  # equal runs give equal pages
    "text.color": INK,
    "xtick.color": EDGE,
    "xtick.labelcolor": MUTED,
    "ytick.color": EDGE,
    "ytick.labelcolor": MUTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn card of a page; `svg` is empty where there was nothing to draw."""

    title: str
    note: str  # what is plotted and how it was thinned out
    svg: str = ""
    wide: bool = True


def draw(name: str, paint: Callable[[Figure], None], *, width: float = FULL, height: float = 2.6) -> str:
    """Let `paint` fill a figure and return it as inline SVG that scales with its card."""
    import matplotlib as mpl  # noqa: PLC0415 - the command line starts without it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(SETTINGS):  # type: ignore[arg-type] # stubs want literal keys
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), name)


def number_axis(axis: Any) -> None:  # noqa: ANN401 - matplotlib's XAxis or YAxis
    """Plain, thousands-separated numbers on a linear or logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 1000 * low else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 4) -> None:
    """Put the legend over the plot's right end, where it hides no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderpad=0, handlelength=1.2)


def _inline(svg: str, name: str) -> str:
    """Drop the prologue and fixed size, and keep identifiers of different figures apart."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)


CSS = """
:root{--ink:#1b2430;--muted:#5f6b7a;--line:#e3e7ed;--card:#fff;--page:#f5f7fa;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);-webkit-font-smoothing:antialiased;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 56px}
header{margin-bottom:22px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em}
.kicker{color:var(--accent);font-weight:600;font-size:12.5px;
 letter-spacing:.08em;text-transform:uppercase;margin:0 0 6px}
.facts{display:flex;flex-wrap:wrap;gap:4px 26px;margin:0;color:var(--muted)}
.facts div{display:flex;gap:7px}.facts dt{color:var(--muted)}.facts dd{margin:0;color:var(--ink);font-weight:550}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin:0 0 16px}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:14px 18px}
.tile p{margin:0;color:var(--muted);font-size:13px}
.tile .figure{font-size:25px;font-weight:620;color:var(--ink);letter-spacing:-.02em;line-height:1.3}
.figure small{font-size:14px;font-weight:500;color:var(--muted);letter-spacing:0}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.card{padding:18px 20px 14px;margin:0;min-width:0}
.wide{grid-column:1/-1}
h2{font-size:16px;margin:0 0 8px;letter-spacing:-.005em}
.card svg{display:block;width:100%;height:auto;margin:2px 0 0}
.card svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
.note{margin:8px 0 0;color:var(--muted);font-size:13px;line-height:1.45}
.empty{color:var(--muted);padding:34px 0;text-align:center;margin:0}
.measures{display:grid;grid-template-columns:repeat(4,1fr);gap:6px 34px}
.measures h3{font-size:14px;margin:0 0 4px}.measures dl{margin:0 0 6px;font-size:13.5px}
.measures dl div{display:flex;justify-content:space-between;padding:4px 0;border-top:1px solid var(--line)}
.measures dt{color:var(--muted)}.measures dd{margin:0;text-align:right;font-variant-numeric:tabular-nums}
.bounds{display:block;color:var(--muted);font-size:12px;font-weight:400;text-align:right;white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:550;font-size:13px}
tbody th{font-weight:500}tbody tr:last-child>*{border-bottom:0}
.best{color:#00674b;font-weight:700}.best::before{content:"\\2605\\a0";font-size:11px}
.config td:nth-child(2){text-align:left;white-space:normal;overflow-wrap:anywhere}
.config td,.config th{vertical-align:top}
summary{cursor:pointer;font-weight:600}details[open] summary{margin-bottom:8px}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{color:var(--muted);font-size:13px;margin-top:20px}
@media(max-width:820px){.grid{grid-template-columns:1fr}.tiles,.measures{grid-template-columns:1fr 1fr}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""
