"""The small traces that ship with the project, in package `gllm_traces`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_ENDING = ".jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A shipped trace: `load_trace(name)` reads it."""

    name: str
    description: str
    num_requests: int


def list_samples() -> tuple[Sample, ...]:
    """Every shipped sample, by name; empty where the package of samples is not installed."""
    return tuple(_described(name, file) for name, file in sorted(_files().items()))


def find_sample(name: str) -> Traversable | None:
    """The file of a shipped sample, None if there is none of that name."""
    return _files().get(name)


def _files() -> dict[str, Traversable]:
    try:
        folder = resources.files("gllm_traces") / "samples"
        return {file.name.removesuffix(_ENDING): file for file in folder.iterdir() if file.name.endswith(_ENDING)}
    except (ModuleNotFoundError, FileNotFoundError):
        return {}


def _described(name: str, file: Traversable) -> Sample:
    header, *rows = file.read_text(encoding="utf-8").splitlines()
    return Sample(name=name, description=json.loads(header)["description"], num_requests=len(rows))
