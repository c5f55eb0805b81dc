"""What an engine wants of a node's workers."""

from __future__ import annotations

import msgspec

from gllm.runtime.config import RuntimeConfig


class WorkerTask(msgspec.Struct):
    """`address` is where the engine listens, empty on other nodes than its own: node 0 tells it."""

    config: RuntimeConfig
    address: str
    folder: str  # private, for the launcher's files
