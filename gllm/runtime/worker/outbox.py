"""Reports that must wait for the device, so that whoever launches its work need not."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.runtime.messages import Report

    Make = Callable[[], Report]


class Outbox:
    """Makes reports one after another in a thread of its own, each when the device is ready for it.

    Args:
        send: takes each report; called from that thread alone.
        fail: takes what went wrong there; it must not return.
    """

    def __init__(self, send: Callable[[Report], None], fail: Callable[[Exception], None]) -> None:
        self._waiting: SimpleQueue[Make] = SimpleQueue()
        self._send, self._fail = send, fail
        threading.Thread(target=self._work, daemon=True, name="outbox").start()

    def put(self, make: Make) -> None:
        """Have a report made, after all that were put in before."""
        self._waiting.put(make)

    def _work(self) -> None:
        while True:
            make = self._waiting.get()
            try:
                self._send(make())
            except Exception as error:  # noqa: BLE001 - a device's errors come out wherever somebody waits for it
                self._fail(error)
