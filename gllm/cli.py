"""`gllm`: the commands of both shells under one name.

Each shell adds its own to the parser; the simulator's are the same as those of `python -m gllm.sim`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.parser import Parser, run
from gllm.sim.cli import add_commands

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    parser = Parser(prog="gllm", description="Serve large language models, or simulate it.", allow_abbrev=False)
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
    return run(parser, argv)
