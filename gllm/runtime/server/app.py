"""The application: which endpoints there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI

from gllm.runtime.server import chat, completions, health, metrics, models
from gllm.runtime.server.errors import install_error_handlers
from gllm.runtime.server.service import Doorkeeper, Service, check_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from gllm.runtime.server.engine import ServedEngine

UNDER_V1 = (models.router, completions.router, chat.router)  # behind the API key, and behind the door
AT_ROOT = (health.router, metrics.router)


def create_app(
    engine: ServedEngine,
    *,
    api_key: str | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[Any]] | None = None,
) -> FastAPI:
    """The server of one engine, as an ASGI application.

    Args:
        engine: what answers.
        api_key: what /v1 asks for; None: nothing.
        lifespan: entered on the server's event loop before the first request, left after the last one.
    """
    service = Service(engine=engine, metrics=metrics.Metrics(engine), api_key=api_key)
    app = FastAPI(title="gLLM", version=health.package_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    for router in UNDER_V1:
        v1.include_router(router)
    for router in (v1, *AT_ROOT):
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(Doorkeeper, door=service.door)
    return app
