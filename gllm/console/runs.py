"""What replaying says, whichever body replays: notes on the trace, the summary, where the report is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.console.terminal import say, say_json, say_table, warn

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

    from gllm.trace import Trace, TraceOptions


def read_trace(args: Namespace, options: TraceOptions) -> Trace:
    """Read the trace and pass on what was changed in it."""
    trace = options.load()
    tell(args, (f"{trace.name}: {note}" for note in trace.notes))
    return trace


def tell(args: Namespace, notes: Iterable[str]) -> None:
    """Notes to standard error, unless --quiet."""
    for note in notes:
        if not args.quiet:
            warn(f"note: {note}")


def show_run(args: Namespace, summary: dict[str, Any]) -> None:
    """A run's summary, as a table or as JSON."""
    if args.json:
        say_json(summary)
        return
    from gllm.report.table import run_table  # noqa: PLC0415

    config = summary["config"]
    title = f"{config['trace']['name']}: {config['model']} on {config['gpus']}, {config['policy']}"
    say_table(run_table(summary, title=title))
    digest = summary["decision_sha256"]
    say(f"decisions SHA-256 {digest}" if digest else "decisions SHA-256 not taken (--no-iterations)")
    if args.out is not None:
        say(f"report {Path(args.out) / 'report.html'}")
