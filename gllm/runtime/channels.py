"""ZeroMQ between our processes: who binds, who connects, and what a process does when its parent is gone.

A front end and its engine talk over sockets in a private folder. The engine reaches its workers through one ROUTER:
a worker's name is its rank, and a connection that breaks is a worker that died, on whichever machine.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zmq
from zmq.utils.monitor import recv_monitor_message

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAUNCHER = b"launcher"
"""The ROUTER's name for the process that watches over a node's workers."""

_HEARTBEAT_MS = 1000
_SILENCE_MS = 10_000  # a machine that says nothing for so long is gone; one that is merely busy is not
_GOODBYE_S = 0.3  # for an engine's last order, which comes before its line breaks, to be read

ENGINE_GONE = 3
"""Exit status of a worker whose engine has gone."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the engine listens."""

    commands: str
    notices: str
    workers: str

    @classmethod
    def within(cls, folder: Path, host: str = "") -> Addresses:
        """Sockets in a folder; workers come over TCP where they run on several machines."""
        return cls(
            commands=f"ipc://{folder}/commands",
            notices=f"ipc://{folder}/notices",
            workers=f"tcp://{host}:*" if host else f"ipc://{folder}/workers",
        )


def socket(context: zmq.Context[Any], kind: int, *, bind: str = "", connect: str = "") -> zmq.Socket[Any]:
    """A socket that never drops a message, and holds up no process that ends."""
    made: zmq.Socket[Any] = context.socket(kind)
    made.set_hwm(0)
    made.linger = 0
    if bind:
        made.bind(bind)
    else:
        made.connect(connect)
    return made


def worker_socket(context: zmq.Context[Any], address: str, name: bytes) -> zmq.Socket[Any]:
    """A worker's end of its line to the engine."""
    made: zmq.Socket[Any] = context.socket(zmq.DEALER)
    made.set_hwm(0)
    made.linger = 1000  # the last word of a worker that fails should arrive
    made.setsockopt(zmq.IDENTITY, name)
    _beat(made)
    made.connect(address)
    return made


def router(context: zmq.Context[Any], address: str) -> tuple[zmq.Socket[Any], zmq.Socket[Any]]:
    """The engine's end of all workers' lines, and a socket that tells of connections that broke."""
    made = context.socket(zmq.ROUTER)
    made.set_hwm(0)
    made.linger = 200
    made.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _beat(made)
    monitor = made.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    made.bind(address)
    return made, monitor


def _beat(sock: zmq.Socket[Any]) -> None:
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)


def watch_connection(sock: zmq.Socket[Any], is_over: threading.Event) -> None:
    """End this process when the other end of its line has gone before all was over; on other machines too."""
    monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def watch() -> None:
        recv_monitor_message(monitor)
        if not is_over.wait(_GOODBYE_S):
            os._exit(ENGINE_GONE)

    threading.Thread(target=watch, daemon=True, name="watch-engine").start()


def watch_parent(ended: Callable[[], object]) -> None:
    """Call `ended` in a thread when the parent has closed our standard input, or died."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a fork would inherit
            pass
        ended()

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
