"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from gllm.runtime.server.service import service_of

if TYPE_CHECKING:
    from gllm.runtime.server.service import Service

router = APIRouter()


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """Every name that a request may use."""
    service = service_of(request)
    return {"object": "list", "data": [_card(service, name) for name in service.names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    service = service_of(request)
    return _card(service, service.check_model(name))


def _card(service: Service, name: str) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": name,
        "object": "model",
        "created": engine.created,
        "owned_by": "gllm",
        "root": engine.model_name,
        "max_model_len": engine.max_model_len,
    }
