"""What a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, as far as they are installed."""
    names = ("gllm", "torch", "triton")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
