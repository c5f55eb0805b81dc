"""`python -m gllm.sim`: replay, compare, diff, and lists of what is known.

Only argparse is imported until a command runs, so that --help is instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from gllm.sim.options import add_engine_options, add_model_options, add_trace_options, rates, whole
from gllm.sim.terminal import close_stdout, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse gives it no public name

USAGE, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


class Parser(argparse.ArgumentParser):
    """Complains in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        warn(f"error: {message}; see {self.prog} --help")
        sys.exit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gllm.sim`; returns the exit status."""
    parser = Parser(prog="python -m gllm.sim", description="Simulate how a trace would be served.", allow_abbrev=False)
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
    return run(parser, argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and carry out; whatever the user can mend ends in one line and a status, without a traceback."""
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status: int = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        warn("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        close_stdout()
        return PIPE_CLOSED
    except Exception as error:
        status = explain(error)
        if not status:
            raise
    return status


def _terminate(number: int, _: object) -> NoReturn:
    """Leave as an exception does, so that nothing half-written stays behind."""
    sys.exit(128 + number)


def explain(error: Exception) -> int:
    """Print the line for an error that is not our own bug; return the exit status, 0 for a bug."""
    from gllm.core import PlanError, StallError  # noqa: PLC0415 - not for --help

    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}", USAGE
    elif isinstance(error, ValueError):
        message, status = str(error), USAGE
    elif isinstance(error, (PlanError, StallError)):
        message, status = str(error), FAILED
    else:
        return 0
    warn(f"error: {message}")
    return status


def add_commands(commands: Commands) -> None:
    """The simulator's commands; `gllm` has them too."""
    _add_replay(commands)
    _add_compare(commands)
    diff = _add(commands, "diff", "gllm.sim.diff", "diff", "name the first decision in which two runs part")
    diff.add_argument("runs", nargs=2, metavar="RUN", help="a folder that replay wrote")
    for name, text in (
        ("traces", "list the sample traces and the formats of others"),
        ("models", "list the models known by name"),
        ("gpus", "list the GPUs known by name"),
        ("policies", "list the policies, their options and the waiting orders"),
    ):
        _add(commands, name, "gllm.sim.listing", name, text)


def _add(commands: Commands, name: str, module: str, function: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=_lazy(module, function))
    return parser


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def command(args: argparse.Namespace) -> int:
        status: int = getattr(import_module(module), function)(args)
        return status

    return command


def _add_replay(commands: Commands) -> None:
    parser = _add(commands, "replay", "gllm.sim.replay", "replay", "replay a trace and report how it was served")
    add_trace_options(parser)
    parser.add_argument("--policy", default="throttle", metavar="P", help="NAME[:key=value,...]; see policies")
    add_model_options(parser)
    add_engine_options(parser)
    _add_output(parser, "report.html, report.json, requests.csv, timeline.json and iterations.jsonl.gz")
    parser.add_argument(
        "--no-iterations", dest="iterations", action="store_false", help="neither log nor hash the decisions: faster"
    )


def _add_compare(commands: Commands) -> None:
    parser = _add(commands, "compare", "gllm.sim.compare", "compare", "set policies side by side, at one or more rates")
    add_trace_options(parser)
    parser.add_argument(
        "--policies",
        action="extend",
        nargs="+",
        required=True,
        metavar="P",
        help="such as throttle,sarathi:token_budget=512",
    )
    parser.add_argument("--rates", type=rates, metavar="R,...", help="requests/s, reached by scaling the arrival times")
    parser.add_argument("--jobs", type=whole(1), metavar="N", help="runs at once; default: one a core")
    add_model_options(parser)
    add_engine_options(parser)
    _add_output(parser, "compare.html, compare.json, compare.csv and the report of each run")
    parser.add_argument("--iterations", action="store_true", help="log the decisions of each run")


def _add_output(parser: argparse.ArgumentParser, files: str) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help=f"folder for {files}")
    group.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    group.add_argument("--quiet", action="store_true", help="no progress, no notes")
