"""What a front end wants of its engine."""

from __future__ import annotations

import msgspec

from gllm.runtime.config import RuntimeConfig


class EngineTask(msgspec.Struct):
    """An engine to run."""

    config: RuntimeConfig
    folder: str  # private, for sockets
