"""`TraceOptions`: which trace to replay and how to bend it, as a configuration keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gllm.trace.load import load_trace

if TYPE_CHECKING:
    from gllm.trace.request import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """Which trace to replay and how to bend it; see `gllm.trace.load_trace`."""

    source: str
    format: str | None = None
    rate_scale: float = 1.0
    window: str | None = None
    limit: int | None = None
    repeat: int = 1
    arrivals: str | None = None
    seed: int = 0
    max_total_tokens: int | None = None

    def load(self) -> Trace:
        """Read the trace.

        Raises:
            ValueError: One line: the file, the row, what is wrong, what to do.
        """
        return load_trace(**asdict(self))
