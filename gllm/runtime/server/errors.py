"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gllm.runtime.errors import EngineDeadError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
CLIENT_GONE = 499  # what nginx logs for it; nobody reads this answer


class ApiError(Exception):
    """A request that ends with this status.

    Args:
        status: of HTTP.
        message: one line: what is wrong, where, how to mend it.
        param: the field of the request that is to blame.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = _writable(" ".join(message.split()))
        self.param = param and _writable(param)

    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = TYPES.get(self.status, TYPES[500] if self.status >= 500 else TYPES[400])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body(), self.status, headers)


def _writable(text: str) -> str:
    """What quotes the client may hold half a surrogate pair."""
    return text.encode(errors="replace").decode()


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param)


def as_api_error(error: Exception) -> ApiError:
    """Any failure, as the client is told of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(500, f"the engine died: {error}")
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's body, in one line."""
    first = error.errors()[0]
    kind, place = first["type"], [str(each) for each in first["loc"] if each != "body"]
    if kind == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']}")
    if not place and kind in {"missing", "model_attributes_type"}:
        return bad_request("the body must be a JSON object, sent with 'Content-Type: application/json'")
    param = first.get("ctx", {}).get("param") or (place[0] if place else None)
    if kind == "extra_forbidden":
        return bad_request(f"unknown field {'.'.join(place)!r}; see what this endpoint takes at /openapi.json", param)
    if kind == "missing":
        return bad_request(f"field {'.'.join(place)!r} is required", param)
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{'.'.join(place)}: {message}" if place else message, param)


async def _api_error(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message).response(dict(error.headers or {}))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure the one shape."""
    handlers = {
        ApiError: _api_error,
        EngineDeadError: _api_error,
        RequestValidationError: _validation,
        HTTPException: _http,
        ClientDisconnect: _gone,
        Exception: _api_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
