"""One measurement of one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Work = Callable[[], object]
"""Runs the kernel once; capturable in a CUDA graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to time, and the least that it must do.

    `make(copies)` draws fresh random inputs on the GPU, as many sets as asked for, and returns one `Work` for each:
    what is timed runs over all of them, so that no input is found in the cache.
    """

    op: str
    size: str  # of the inputs, in words: "64 sequences of 1150 keys"
    make: Callable[[int], list[Work]]
    num_bytes: float  # each input read once, each output written once
    num_flops: float = 0.0
    rivals: Mapping[str, Callable[[int], list[Work]]] = field(default_factory=dict)  # the same work by others
