"""`GET /health`, `/ping` and `/version`, for whoever watches the server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gllm.runtime.server.errors import ApiError
from gllm.runtime.server.service import service_of

router = APIRouter()


@router.get("/health", response_model=None)
@router.get("/ping", response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are served.

    Raises:
        ApiError: 503, with the reason.
    """
    service = service_of(request)
    service.check_alive()
    if service.door.closed:
        raise ApiError(503, "the server is shutting down")
    return Response(status_code=200)


@router.get("/version")
async def show_version() -> dict[str, str]:
    """Of this package."""
    return {"version": package_version()}


def package_version() -> str:
    """What is installed; "unknown" for a source tree that is not."""
    try:
        return version("gllm")
    except PackageNotFoundError:
        return "unknown"
