"""What all endpoints share: the engine, what is measured, and the door that closes when the server drains."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation of a dependency

from gllm.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from gllm.runtime.server.engine import ServedEngine
    from gllm.runtime.server.metrics import Metrics


@dataclass(slots=True)
class Door:
    """Counts the requests inside. Once closed it lets nobody in; whoever is inside finishes or is cut off."""

    num_inside: int = 0
    closed: bool = False
    is_cut: bool = False
    _inside: set[asyncio.Future[None]] = field(default_factory=set)

    def cut_off(self) -> None:
        """Tell whoever is inside that there is no more time. On the event loop's thread."""
        self.closed = self.is_cut = True
        for each in self._inside:
            if not each.done():
                each.set_result(None)

    async def wait_for_cut(self) -> None:
        """Return when there is no more time."""
        if self.is_cut:
            return
        told = asyncio.get_running_loop().create_future()
        self._inside.add(told)
        try:
            await told
        finally:
            self._inside.discard(told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One engine behind one application."""

    engine: ServedEngine
    metrics: Metrics
    api_key: str | None = None
    door: Door = field(default_factory=Door)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a request may use."""
        return self.engine.served_names or (self.engine.model_name,)

    def check_alive(self) -> None:
        """Refuse what a dead engine cannot do.

        Raises:
            ApiError: 503, with the reason.
        """
        if self.engine.failure is not None:
            raise ApiError(503, f"the engine is dead: {self.engine.failure}")

    def check_model(self, name: str | None) -> str:
        """The model's name if it is served here; without one, the first.

        Raises:
            ApiError: 404, with the names that are.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(404, f"model {name!r} is not served here; choose {' or '.join(self.names)}", "model")
        return name


def service_of(request: Request) -> Service:
    """The service that this request came to."""
    service: Service = request.app.state.service
    return service


async def check_key(request: Request) -> None:
    """Let in who knows the key, if there is one.

    Raises:
        ApiError: 401.
    """
    key = service_of(request).api_key
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
        return
    raise ApiError(401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'")


class Doorkeeper:
    """Middleware that counts who is inside /v1, and answers 503 once the door is closed."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or not."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
        elif self.door.closed:
            refusal = ApiError(503, "the server is shutting down and takes no more requests")
            await refusal.response({"Connection": "close"})(scope, receive, send)
        else:
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.door.num_inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.door.num_inside -= 1
