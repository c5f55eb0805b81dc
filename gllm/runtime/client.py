"""A front end's side of its engine: starts the process, sends commands, hands out notices, notices deaths."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from gllm.runtime import process
from gllm.runtime.channels import Addresses, socket
from gllm.runtime.engine.task import EngineTask
from gllm.runtime.errors import EngineDeadError, StartError
from gllm.runtime.messages import Abort, Dead, Finish, Loading, Ready, Record, Submit, decode_notice, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.messages import Command, NewRequest, Notice

_LOOK_MS = 100  # how often a silent engine is looked after
_GOODBYE_S = 10.0
_LATE_S = 0.002  # what ZeroMQ, whose clock has milliseconds, may be late by
_NAP_S = 0.00005


class EngineClient:
    """An engine in a process of its own.

    The constructor returns while the model is still loading; `wait_until_ready` before the first request.
    Commands may come from any thread, notices are for one.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.model = config.check()
        config.nodes.check_endpoint()
        if find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        self.config = config
        self.failure: str | None = None
        self.ready = Ready(0, 0, "")
        self._folder = Path(tempfile.mkdtemp(prefix="gllm-"))
        addresses = Addresses.within(self._folder)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._commands = socket(self._context, zmq.PUSH, connect=addresses.commands)
        self._notices = socket(self._context, zmq.PULL, connect=addresses.notices)
        self._lock = threading.Lock()
        self._engine = process.start("gllm.runtime.engine", EngineTask(config, str(self._folder)))

    def wait_until_ready(self, tell: Callable[[str], None] = lambda _: None) -> Ready:
        """Wait for the model; `tell` hears how far it is.

        Raises:
            StartError: It cannot be loaded, and the user can mend that.
            EngineDeadError: A process died.
        """
        while True:
            notice = self.receive(None)
            if isinstance(notice, Ready):
                self.ready = notice
                return notice
            if isinstance(notice, Loading):
                tell(notice.text)

    def submit(self, requests: list[NewRequest]) -> None:
        """Send requests, which one turn of the engine will see together."""
        self._send(Submit(requests))

    def abort(self, keys: Iterable[int]) -> None:
        """Forget requests; unknown keys are those that have ended."""
        self._send(Abort(list(keys)))

    def receive(self, timeout_s: float | None) -> Notice | None:
        """The next notice; None if there was none in time, which is kept to within a tenth of a millisecond.

        Raises:
            StartError: The engine gave up for a reason that the user can mend.
            EngineDeadError: The engine or a worker died.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else deadline - time.monotonic()
            dead = self._engine.poll() is not None  # looked at before its last words are read
            if self._notices.poll(_LOOK_MS if left_s is None else _poll_ms(left_s)):
                return self._checked(decode_notice(self._notices.recv()))
            if dead:
                self._fail(f"the engine process {process.how(self._engine.returncode)}")
            if left_s is None:
                continue
            if left_s <= 0:
                return None
            if left_s <= _LATE_S:
                time.sleep(min(left_s, _NAP_S))

    def finish(self) -> bytes | None:
        """End the engine in good order; return the columns of the run's record, if one was kept."""
        self._send(Finish())
        while True:
            notice = self.receive(None)
            if isinstance(notice, Record):
                return notice.columns

    def close(self) -> None:
        """Leave no process, socket or file behind; safe to call twice."""
        if self.config.nodes.num_nodes > 1 and self.ready.num_blocks and self.failure is None:
            with suppress(EngineDeadError):
                self.finish()  # the other nodes' workers must hear that this is a good end
        process.end(self._engine, _GOODBYE_S if self.failure is None else 0.5)
        self.failure = self.failure or "the engine was closed; make another"
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _checked(self, notice: Notice) -> Notice:
        if isinstance(notice, Dead):
            self._fail(notice.reason, usage=notice.usage and not self.ready.num_blocks)
        return notice

    def _fail(self, reason: str, *, usage: bool = False) -> None:
        self.failure = self.failure or reason
        raise (StartError if usage else EngineDeadError)(self.failure)

    def _send(self, command: Command) -> None:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        with self._lock:
            self._commands.send(encode(command))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _poll_ms(left_s: float) -> int:
    """How long to wait for a notice so that there is still time to take a nap."""
    return min(_LOOK_MS, max(0, int(1000 * (left_s - _LATE_S))))
