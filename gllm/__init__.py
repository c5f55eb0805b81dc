"""gLLM serves large language models across GPUs and carries its own digital twin."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gllm.runtime.llm import LLM
    from gllm.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "gllm.runtime.llm", "SamplingParams": "gllm.runtime.sampling_params"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whichever it is
    """The offline API, imported only when asked for: the twin runs without what it needs."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
