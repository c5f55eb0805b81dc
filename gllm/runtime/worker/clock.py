"""When a stage computes a step."""

from __future__ import annotations

import time

import torch

Stamp = int | torch.cuda.Event
"""A moment: on a CPU in ns of the monotonic clock; on a GPU an event of its stream, which the host runs ahead of."""


class StageClock:
    """Stamps moments of a device's work, on the host's monotonic clock.

    Reading a GPU's stamp waits for the work before it: a clock is for runs that are recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            torch.cuda.synchronize(device)
            self._last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last.record()
            self._last.synchronize()
            self._last_ns = time.monotonic_ns()

    def stamp(self) -> Stamp:
        """The moment at which the work so far will be done."""
        if not self._is_gpu:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read_ns(self, stamp: Stamp) -> int:
        """A stamp's time; stamps are read in the order in which they were made."""
        if isinstance(stamp, int):
            return stamp
        stamp.synchronize()
        # From one stamp to the next: CUDA gives 32-bit milliseconds, too coarse over minutes.
        self._last_ns += round(self._last.elapsed_time(stamp) * 1e6)
        self._last = stamp
        return self._last_ns
