"""A command line whose every complaint is one line and an exit status.

Only argparse is imported until a command runs, so that --help is instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from gllm.console.errors import CommandError
from gllm.console.terminal import close_stdout, warn

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
    elif isinstance(error, (CommandError, PlanError, StallError)):
        message, status = str(error), FAILED
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("gllm"):
        message = f"{error.name} is not installed; pip install 'gllm[runtime]' brings what serving needs"
        status = FAILED
    else:
        return 0
    warn(f"error: {message}")
    return status


def add_command(commands: Commands, name: str, module: str, function: str, text: str) -> argparse.ArgumentParser:
    """A command that is carried out by `function` of `module`, imported only then."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(command=_lazy(module, function))
    return parser


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def command(args: argparse.Namespace) -> int:
        status: int = getattr(import_module(module), function)(args)
        return status

    return command


def add_output(parser: argparse.ArgumentParser, files: str) -> None:
    """Where the results of a command go."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help=f"folder for {files}")
    group.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    group.add_argument("--quiet", action="store_true", help="no progress, no notes")
