"""Streams from any OpenAI endpoint, and when their tokens came.

A client that measures must not be what is measured. httpx takes some 90 us of CPU for an event, which would cap a run
at 11,000 tokens/s; connections of our own over httptools take 20, with uvloop 6. httpx asks all else.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import httptools
import httpx
import msgspec

from gllm.console.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from typing import TypeVar

    T = TypeVar("T")

CLIENT_TIMEOUT_S = 30.0
QUOTED = 300
"""Characters of an error that are shown."""


class Endpoint(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    tls: bool
    root: str  # the base URL's path, without /v1
    headers: dict[str, str]

    @property
    def url(self) -> str:
        """The base URL, without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.root}"


def endpoint_of(base_url: str, api_key: str | None = None) -> Endpoint:
    """Read a base URL, with or without /v1 at its end.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ValueError(f"--base-url {base_url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--base-url {base_url!r} is no URL; give one like http://127.0.0.1:8000")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    root = parts.path.rstrip("/").removesuffix("/v1")
    return Endpoint(parts.hostname, port, parts.scheme == "https", root, headers)


def first_model(endpoint: Endpoint) -> str:
    """The first model that a server names.

    Raises:
        CommandError: nobody answers there, or names no model.
    """
    url = f"{endpoint.url}/v1/models"
    try:
        answer = httpx.get(url, headers=endpoint.headers, timeout=CLIENT_TIMEOUT_S, trust_env=False)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except httpx.TransportError as error:
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
        raise CommandError(f"{endpoint.url}: no server answers there ({reason})") from None
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        raise CommandError(f"{url}: names no model (status {answer.status_code}); say which with --model") from None


@dataclass(slots=True)
class Answer:
    """How one request went. Times are of `time.perf_counter`."""

    start_s: float
    end_s: float = 0.0  # of the last event that had a choice
    token_s: list[float] = field(default_factory=list)  # of each event that brought text
    num_prompt_tokens: int | None = None  # as the server counts
    num_output_tokens: int = 0  # as the server counts, else events
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """To the first text; to the end, where tokens came to no text."""
        return (self.token_s[0] if self.token_s else self.end_s) - self.start_s

    @property
    def e2e_s(self) -> float:
        """To the end."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None for a single token."""
        steps = self.num_output_tokens - 1
        return (self.e2e_s - self.ttft_s) / steps if steps > 0 else None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    logprobs: Any = None

    def brings_tokens(self) -> bool:
        delta = self.delta
        said = delta is not None and (delta.content or delta.reasoning or delta.reasoning_content)
        return bool(self.text or said or self.logprobs)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class EventReader:
    """Reads server-sent events, however they are cut into parts, into an `Answer`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.is_done = False
        self._rest = b""

    def feed(self, part: bytes, now_s: float) -> None:
        """More of the body came."""
        lines = (self._rest + part).split(b"\n") if self._rest else part.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)

    def _take(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        answer = self.answer
        try:
            event = _decode(data)
        except msgspec.MsgspecError as error:
            answer.error = f"not a chunk of a completion ({error}): {data[:QUOTED].decode(errors='replace')}"
            return
        if event.error is not None:
            answer.error = message_of(data)
        if event.choices:
            answer.end_s = now_s
            if event.choices[0].brings_tokens():
                answer.token_s.append(now_s)
        if event.usage is not None:
            self._count(event.usage)

    def _count(self, usage: _Usage) -> None:
        answer = self.answer
        answer.num_prompt_tokens = usage.prompt_tokens
        answer.num_output_tokens = usage.completion_tokens or 0
        if usage.prompt_tokens_details is not None:
            answer.num_cached_tokens = usage.prompt_tokens_details.cached_tokens


def message_of(body: bytes) -> str:
    """What an error in OpenAI's shape says; else its text."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        text = str(found["error"]["message"] if isinstance(found["error"], dict) else found["error"])
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:QUOTED]


class _Connection(asyncio.Protocol):
    """One connection, one request at a time; httptools calls the methods that begin with `on_`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport
        self._done: asyncio.Future[None] | None = None
        self._now_s = 0.0

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """Send a request; the future is done when `answer` is complete."""
        self._parser = httptools.HttpResponseParser(self)
        self._reader = EventReader(answer)
        self._error_body: list[bytes] = []
        self._status = 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a socket's

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        if self._done is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP answer ({type(error).__name__}: {error})")
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        ended = self._status == 200 and self._reader.is_done if self._done is not None else True
        self._end(None if ended else f"the connection broke off ({exc or 'closed by the server'})")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._reader.feed(body, self._now_s)
        else:
            self._error_body.append(body)

    def on_message_complete(self) -> None:
        keep = self._parser.should_keep_alive()
        if self._status == 200:
            answer = self._reader.answer
            self._end(None if answer.end_s or answer.error else "the stream brought no choice")
        else:
            self._end(f"{self._status}: {message_of(b''.join(self._error_body))}")
        if keep:
            self._pool.keep(self)
        else:
            self._transport.close()

    def _end(self, error: str | None) -> None:
        done, self._done = self._done, None
        if done is None or done.done():
            return
        answer = self._reader.answer
        answer.error = answer.error or error
        answer.num_output_tokens = answer.num_output_tokens or len(answer.token_s)
        done.set_result(None)


class Pool:
    """Connections to one endpoint, as many as there are requests at once."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def stream(self, path: str, body: Mapping[str, Any]) -> Answer:
        """POST a request that streams its answer; whatever fails is in the answer's `error`."""
        request = self._request(path, body)
        answer = Answer(time.perf_counter())
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._idle.pop() if self._idle else await self._connect()
                await connection.ask(request, answer)
        except TimeoutError:
            answer.error = f"no complete answer within {self._timeout_s:g} s"
            if connection is not None:
                connection.close()
        except OSError as error:
            answer.error = f"no server answers there ({error.strerror or error})"
        return answer

    def keep(self, connection: _Connection) -> None:
        """It can be asked again."""
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """It is closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close what is idle."""
        for connection in list(self._idle):
            connection.close()

    async def _connect(self) -> _Connection:
        host, port, tls = self._endpoint[:3]
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), host, port, ssl=tls or None)
        return connection

    def _request(self, path: str, body: Mapping[str, Any]) -> bytes:
        host, port, _, root, headers = self._endpoint
        content = msgspec.json.encode(body)
        lines = [f"POST {root}{path} HTTP/1.1", f"host: {host}:{port}", "content-type: application/json"]
        lines += [f"content-length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + content


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop where that is installed."""
    try:
        import uvloop  # noqa: PLC0415
    except ModuleNotFoundError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
