"""Server-sent events, and noticing that a client hung up."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gllm.runtime.errors import EngineDeadError
from gllm.runtime.server.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from starlette.types import Receive, Scope, Send

    from gllm.runtime.server.service import Door

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold tokens back
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """One event."""
    return f"data: {_encode(value)}\n\n".encode()


async def unless_gone(receive: Receive, door: Door, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up or the door cuts it off.

    Args:
        receive: tells when the client hangs up; its request must have been read.
        door: tells when a drain has no more patience.
        work: what takes its time.

    Raises:
        ClientDisconnect: It hung up first.
        ApiError: 503, the server ends first.
    """
    working, hung_up = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    tasks = (working, hung_up, asyncio.ensure_future(door.wait_for_cut()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if hung_up.done():
            raise ClientDisconnect
        raise ApiError(503, "the server shut down before this answer was complete")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` until they end, an error ends them, or the client goes away; closes them and `source` then.

    An error after the headers is one last event of OpenAI's shape, without the closing `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None], door: Door) -> None:
        self.door = door
        self.events = events
        self.source = source
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        del scope
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_all(receive, send)
        except (ClientDisconnect, OSError):
            pass  # nobody is left to tell
        finally:
            await self.events.aclose()
            await self.source.aclose()  # events that were never begun do not close it

    async def _send_all(self, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.door, self._send_events(send))
        except (ClientDisconnect, OSError):
            raise
        except Exception as error:  # the headers are out: this is the only way to say it
            if not isinstance(error, ApiError | EngineDeadError):
                logging.getLogger(__name__).exception("a stream failed")
            await _send_part(send, event(as_api_error(error).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async for each in self.events:
            await _send_part(send, each)


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
