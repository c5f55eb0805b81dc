"""What commands say: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def say(text: str) -> None:
    """A line of the result."""
    print(text)  # noqa: T201 - this is the one place that prints


def warn(text: str) -> None:
    """A line on standard error, marked as ours."""
    print(f"gllm: {' '.join(text.split())}", file=sys.stderr, flush=True)  # noqa: T201


def say_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """The result for a program to read."""
    say(json.dumps(value, indent=2, allow_nan=False))


def say_table(table: Table) -> None:
    """A table, as wide as the terminal allows."""
    from rich.console import Console  # noqa: PLC0415 - the command line starts without it

    Console(highlight=False).print(table)


def close_stdout() -> None:
    """Let nothing more be written to a closed pipe, the interpreter's last flush included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
