"""Running the application: a port taken early, a drain on SIGTERM, an exit status."""

from __future__ import annotations

import errno
import logging
import math
import socket
import time
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from gllm.runtime.server.service import Service

BACKLOG = 2048
KEEP_ALIVE_S = 65  # longer than clients' pools keep a connection, so that they never reuse one that is closing
CUT_OFF_S = 1  # for requests that the drain's end cuts off to say so


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything slow. It listens only in `serve_app`: until then clients are told to come again.

    Raises:
        ValueError: It cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ValueError(_why_not(host, port, error)) from error
    return sock


def _why_not(host: str, port: int, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return f"port {port} on {host} is taken; choose another with --port"
    if code == errno.EACCES:
        return f"port {port} on {host} needs more rights; choose one above 1023 with --port"
    if isinstance(error, OverflowError):
        return f"--port is {port}; it must be from 0 to 65535"
    return f"--host {host} is no address of this machine ({error})"


class Server(uvicorn.Server):
    """uvicorn that drains before it stops, and stops by itself when its engine is dead.

    Args:
        app: made by `create_app`.
        drain_timeout_s: the longest that running requests may take once the drain has begun.
        linger_s: how long /health says why the engine died before the server stops.
    """

    def __init__(self, app: FastAPI, *, drain_timeout_s: float = 30, linger_s: float = 0.5) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CUT_OFF_S,
            )
        )
        self._service: Service = app.state.service
        self._drain_timeout_s = drain_timeout_s
        self._linger_s = linger_s
        self._stop_at_s = math.inf  # by the monotonic clock, at the latest

    def drain(self) -> None:
        """Let running requests finish, refuse new ones with 503, then stop."""
        self._service.door.closed = True
        self._stop_at_s = min(self._stop_at_s, time.monotonic() + self._drain_timeout_s)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, another one ends the drain."""
        del sig, frame
        if self._service.door.closed:
            self._stop_at_s = time.monotonic()
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to stop."""
        now_s, door = time.monotonic(), self._service.door
        if self._service.engine.failure is not None:
            self._stop_at_s = min(self._stop_at_s, now_s + self._linger_s)
        if now_s >= self._stop_at_s:
            door.cut_off()
        self.should_exit |= door.is_cut or (door.closed and not door.num_inside)
        return await super().on_tick(counter)


def serve_app(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    sock: socket.socket | None = None,
    *,
    drain_timeout_s: float = 30,
    linger_s: float = 0.5,
) -> int:
    """Serve until a signal or the engine's death.

    Args:
        app: made by `create_app`.
        host: where to listen, if there is no `sock`.
        port: the same.
        sock: what `bind` gave.
        drain_timeout_s: see `Server`.
        linger_s: see `Server`.

    Returns:
        An exit status: 0, or 1 if the engine died.

    Raises:
        ValueError: The port cannot be had.
    """
    sock = bind(host, port) if sock is None else sock
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        address = sock.getsockname()
        sock.close()
        raise ValueError(_why_not(address[0], address[1], error)) from error
    # asyncio warns when a client has gone in the middle of a burst of tokens; the stream hears of it a moment later.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    Server(app, drain_timeout_s=drain_timeout_s, linger_s=linger_s).run(sockets=[sock])
    service: Service = app.state.service
    return 0 if service.engine.failure is None else 1
