"""What a command line reports in one line."""

from __future__ import annotations


class CommandError(Exception):
    """A command could not do what it was asked to, through no fault of its user; exit status 1."""
