"""What can go wrong while the runtime serves."""

from __future__ import annotations

from gllm.console.errors import CommandError


class EngineDeadError(CommandError):
    """The engine or one of its workers is gone; the message says what died. Nothing more can be served."""


class StartError(ValueError):
    """The runtime cannot start, and the user can mend it; the message says how."""
