"""Ways to bend a trace before it is replayed. Each takes requests and gives requests; none mutates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise, repeat
from typing import TYPE_CHECKING

from gllm.trace.errors import TraceError
from gllm.trace.fields import NS_PER_S, decimal_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.trace.arrivals import Arrivals
    from gllm.trace.request import TraceRequest

    Requests = Sequence[TraceRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The times from `start_ns` up to, not including, `end_ns`."""

    start_ns: int = 0
    end_ns: int | None = None


def parse_window(text: str) -> Window:
    """`START:END` in seconds after the trace's start; either may be left out, `:` is all of it."""
    start, colon, end = text.partition(":")
    if not colon:
        raise TraceError(f"window {text!r} has no colon; write START:END in seconds, e.g. 60:120, 60: or :120")
    window = Window(
        start_ns=decimal_ns(start, "the window's start") if start.strip() else 0,
        end_ns=decimal_ns(end, "the window's end") if end.strip() else None,
    )
    if window.end_ns is not None and window.end_ns <= window.start_ns:
        raise TraceError(f"window {text!r} ends before it starts; write START:END in seconds, e.g. 60:120")
    return window


def in_order(requests: Requests, notes: list[str]) -> Requests:
    """By arrival, equal times in the file's order, the first at 0."""
    num_late = sum(_arrival(b) < _arrival(a) for a, b in pairwise(requests))
    if num_late:
        notes.append(
            f"rows that came before their predecessor, now sorted by arrival: {num_late:,} of {len(requests):,}"
        )
        requests = sorted(requests, key=_arrival)
    start_ns = _arrival(requests[0])
    return [moved(request, _arrival(request) - start_ns) for request in requests]


def in_window(requests: Requests, window: Window, notes: list[str]) -> Requests:
    """In order, those that arrive within `window`; the first of them at 0."""
    requests = in_order(requests, notes)
    last_ns = _arrival(requests[-1])
    end_ns = last_ns + 1 if window.end_ns is None else window.end_ns
    kept = [request for request in requests if window.start_ns <= _arrival(request) < end_ns]
    if not kept:
        last_s = last_ns / NS_PER_S
        raise TraceError(f"the window holds none of {len(requests):,} requests; the last arrives at {last_s:.3f} s")
    return in_order(kept, notes)


def repeated(requests: Requests, times: int, limit: int | None) -> Requests:
    """All of them `times` over (0: until there are `limit`), each round a mean gap after the last.

    A repeated request has the same prompt, so it hits the prefix cache.
    """
    count = len(requests)
    rounds = -(-(limit or 0) // count) if times == 0 else times
    span_ns = (requests[-1].arrival_ns or 0) - (requests[0].arrival_ns or 0)
    period_ns = span_ns * count // max(count - 1, 1)
    again = chain.from_iterable(repeat(requests, rounds))
    return [_later(request, n // count * period_ns) for n, request in enumerate(islice(again, limit))]


def drawn(requests: Requests, process: Arrivals | None, seed: int) -> Requests:
    """At times drawn from `process`, in the same order; None: as they are."""
    if process is None:
        return requests
    times_ns = process.times(len(requests), seed)
    return [moved(request, time_ns) for request, time_ns in zip(requests, times_ns, strict=True)]


def faster(requests: Requests, scale: float) -> Requests:
    """Arrivals `scale` times as fast; a deadline stays as far behind its arrival as it was."""
    if scale == 1:
        return requests
    return [moved(request, round(_arrival(request) / scale)) for request in requests]


def clipped(requests: Requests, max_total_tokens: int | None, notes: list[str]) -> Requests:
    """Prompt and output of at most `max_total_tokens` together; at least one output token is left."""
    if max_total_tokens is None:
        return requests
    clips = [_clip(request, max_total_tokens) for request in requests]
    num_clipped = sum(clip is not request for clip, request in zip(clips, requests, strict=True))
    if num_clipped:
        notes.append(f"requests clipped to {max_total_tokens:,} tokens in total: {num_clipped:,} of {len(requests):,}")
    return clips


def moved(request: TraceRequest, arrival_ns: int) -> TraceRequest:
    """The request at another time, its deadline as far behind it as before."""
    if arrival_ns == request.arrival_ns:
        return request
    deadline_ns = request.deadline_ns
    if deadline_ns is not None:
        deadline_ns += arrival_ns - (request.arrival_ns or 0)
    return replace(request, arrival_ns=arrival_ns, deadline_ns=deadline_ns)


def _later(request: TraceRequest, delay_ns: int) -> TraceRequest:
    return request if request.arrival_ns is None else moved(request, request.arrival_ns + delay_ns)


def _clip(request: TraceRequest, total: int) -> TraceRequest:
    if request.num_prompt_tokens + request.num_output_tokens <= total:
        return request
    num_prompt_tokens = min(request.num_prompt_tokens, total - 1)
    room = total - num_prompt_tokens
    return replace(
        request,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=min(request.num_output_tokens, room),
        max_tokens=None if request.max_tokens is None else min(request.max_tokens, room),
    )


def _arrival(request: TraceRequest) -> int:
    assert request.arrival_ns is not None  # noqa: S101 - our own bug: `load_trace` sees to it
    return request.arrival_ns
