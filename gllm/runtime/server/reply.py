"""From the engine's deltas to an HTTP answer, whole or streamed; what both ways to generate have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fastapi.responses import JSONResponse, Response

from gllm.runtime.errors import EngineDeadError
from gllm.runtime.server.errors import ApiError
from gllm.runtime.server.generation import Usage, gather
from gllm.runtime.server.service import service_of
from gllm.runtime.server.sse import DONE, EventStream, event, unless_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from fastapi import Request

    from gllm.runtime.server.generation import Gathered, Job, Piece
    from gllm.runtime.server.protocol import GenerationBody


class Form(Protocol):
    """How an endpoint writes its answers."""

    @property
    def jobs(self) -> Sequence[Job]:
        """What is generated."""
        ...

    def whole(self, gathered: Gathered) -> dict[str, Any]:
        """Everything at once, but for the usage."""
        ...

    def head(self) -> dict[str, Any]:
        """What every chunk of a stream carries."""
        ...

    def choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a delta adds to a stream: one chunk each."""
        ...


async def reply(request: Request, body: GenerationBody, form: Form, pieces: AsyncGenerator[Piece, None]) -> Response:
    """Answer a request; when its client hangs up, `pieces` are closed and the engine's work ends.

    A stream's headers wait for its first delta, so that a request the engine refuses gets a proper status.

    Raises:
        ApiError: See `generate`; 503 where the engine died before a stream's headers.
        EngineDeadError: It died before the whole answer was there.
        ClientDisconnect: Nobody is left to answer.
    """
    door = service_of(request).door
    usage = Usage(sum(len(job.prompt_token_ids) for job in form.jobs))
    try:
        if not body.stream:
            gathered = await unless_gone(request.receive, door, gather(pieces, form.jobs, usage))
            return JSONResponse(form.whole(gathered) | {"usage": usage.to_json()})
        first = await unless_gone(request.receive, door, anext(pieces))
    except BaseException as error:
        await pieces.aclose()
        if body.stream and isinstance(error, EngineDeadError):
            raise ApiError(503, f"the engine is dead: {error}") from error
        raise
    return EventStream(_events(body, form, usage, first, pieces), pieces, door)


async def _events(
    body: GenerationBody, form: Form, usage: Usage, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    options, head = body.stream_options, form.head()
    with_usage = options is not None and bool(options.include_usage)
    each_time = options is not None and bool(options.continuous_usage_stats)
    piece: Piece | None = first
    while piece is not None:
        usage.add(piece)
        told = {"usage": usage.to_json() if each_time else None} if with_usage or each_time else {}
        for choice in form.choices(piece):
            yield event(head | {"choices": [choice]} | told)
        piece = await anext(pieces, None)
    if with_usage:
        yield event(head | {"choices": [], "usage": usage.to_json()})
    yield DONE
