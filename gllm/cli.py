"""`gllm`: the commands of both shells under one name.

Each shell adds its own to the parser. `replay` is the simulator's; the runtime's is `python -m gllm.runtime replay`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.parser import Parser, run
from gllm.runtime.cli import add_commands as add_runtime_commands
from gllm.sim.cli import add_commands as add_sim_commands

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.console.parser import Commands


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    parser = Parser(prog="gllm", description="Serve large language models, or simulate it.", allow_abbrev=False)
    commands: Commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_runtime_commands(commands)
    add_sim_commands(commands)
    return run(parser, argv)
