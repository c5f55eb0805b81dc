"""Whatever the bytes and the options are: a trace, or a `TraceError` of one line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from datetime import UTC

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gllm.trace import FORMATS, Trace, TraceError, TraceRequest, load_trace, trace_lines, write_trace

NATURALS = st.integers(0, 5000)
TIMES = st.datetimes(timezones=st.just(UTC)).map(str) | st.just("2023-11-16 18:17:03.9799600")
CELLS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.sampled_from(["1e3", "-1", "", "2024-02-30T00:00:00Z", '"', "\x00", "1,2", "\N{ARABIC-INDIC DIGIT THREE}"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
OWN_KEYS = (
    "arrival_ns",
    "num_prompt_tokens",
    "num_output_tokens",
    "hash_ids",
    "hash_block_size",
    "max_tokens",
    "extra",
)
GOOD = {"TIMESTAMP": TIMES, "hash_ids": st.lists(NATURALS, max_size=5), "extra": st.just({})}
TABLES = [FORMATS[name].needs for name in ("azure2023", "azure2025", "burstgpt", "vidur", "lengths")]
OBJECTS = [FORMATS["mooncake"].needs, FORMATS["qwen"].needs, OWN_KEYS]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def rows(draw, keys, wrong):
    """A few good rows, mostly with one wrong value somewhere."""
    table = [[draw(GOOD.get(key, NATURALS)) for key in keys] for _ in range(draw(st.integers(0, 4)))]
    if table and draw(st.booleans()):
        draw(st.sampled_from(table))[draw(st.integers(0, len(keys) - 1))] = draw(wrong)
    return table


@st.composite
def tables(draw):
    columns = draw(st.sampled_from(TABLES))
    return "\n".join(",".join(map(str, row)) for row in [columns, *draw(rows(columns, CELLS))])


@st.composite
def objects(draw):
    keys = draw(st.sampled_from(OBJECTS))
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in draw(rows(keys, VALUES))]
    return "\n".join(['{"gllm_trace": 1}', *lines] if keys is OWN_KEYS else lines)


TEXTS = st.one_of(tables(), objects(), objects(), st.text())
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from([*FORMATS, "other"]),
        "window": st.one_of(st.text(max_size=6), st.sampled_from(["1:2", ":3", "0:", "1e-9:1e9"])),
        "limit": st.integers(-1, 5),
        "repeat": st.integers(-1, 3),
        "arrivals": st.one_of(st.text(max_size=9), st.sampled_from(["poisson:3", "gamma:1e-6:100", "burst"])),
        "rate_scale": st.floats() | st.floats(1e-6, 1e6),
        "max_total_tokens": st.integers(-1, 100),
    },
)


def loads_or_refuses(path, **options):
    try:
        trace = load_trace(path, **options)
    except TraceError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any other exception must fail the test
        return
    arrivals = [request.arrival_ns for request in trace.requests]
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    assert all(r.num_prompt_tokens >= 1 and r.num_output_tokens >= 1 for r in trace.requests)


@FUZZ
@given(content=st.binary(max_size=300), zipped=st.booleans())
def test_random_bytes(trace_file, content, zipped):
    loads_or_refuses(trace_file(gzip.compress(content) if zipped else content))


@FUZZ
@given(text=TEXTS, options=OPTIONS)
def test_random_rows_and_options(trace_file, text, options):
    loads_or_refuses(trace_file(text.encode(errors="surrogatepass")), **options)


@FUZZ
@given(text=TEXTS)
def test_random_rows(trace_file, text):
    loads_or_refuses(trace_file(text.encode(errors="surrogatepass")), arrivals="burst")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize(
    "name",
    [
        "azure2023_code.csv.gz",
        "burstgpt_3.csv.gz",
        "mooncake_arxiv_first1000.jsonl.gz",
        "qwen_traceA_chat0-31.jsonl.gz",
    ],
)
def test_mutated_public_rows(public, trace_file, name, data):
    with gzip.open(public(name)) as file:
        content = bytearray(b"".join(next(file) for _ in range(4)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    loads_or_refuses(trace_file(bytes(content)))


FINITE = st.floats(allow_nan=False, allow_infinity=False)
EXTRA = st.dictionaries(
    st.text(max_size=3), st.one_of(st.none(), st.booleans(), st.integers(), FINITE, st.text()), max_size=3
)
REQUESTS = st.builds(
    TraceRequest,
    arrival_ns=st.integers(0, 2**62),
    num_prompt_tokens=st.integers(1, 10**9),
    num_output_tokens=st.integers(1, 10**9),
    hash_ids=st.lists(st.integers(-3, 9) | st.integers(), max_size=9).map(tuple),
    hash_block_size=st.just(16),
    priority=st.integers(-9, 9),
    deadline_ns=st.none() | st.integers(2**62, 2**63 - 1),
    max_tokens=st.none() | st.integers(1, 10**6),
    extra=EXTRA,
)


@FUZZ
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6), size=st.integers(1, 600), zipped=st.booleans())
def test_written_and_read_is_the_same(trace_file, requests, size, zipped):
    requests = [replace(request, hash_block_size=size) for request in requests]
    from gllm.trace.shape import in_order

    ordered = tuple(in_order(requests, []))
    path = trace_file("", "t.jsonl.gz" if zipped else "t.jsonl")
    write_trace(Trace(name="t", format="made", requests=ordered), path, description="of a test")
    assert load_trace(path).requests == ordered


def test_what_json_cannot_hold_is_refused():
    request = TraceRequest(arrival_ns=0, num_prompt_tokens=1, num_output_tokens=1, extra={"x": object()})
    with pytest.raises(TraceError, match="request 1 cannot be written as JSON"):
        list(trace_lines([request], name="t"))
    with pytest.raises(TraceError, match="request 1 cannot be written as JSON"):
        list(
            trace_lines(
                [TraceRequest(arrival_ns=0, num_prompt_tokens=1, num_output_tokens=1, extra={"x": 1e999})], name="t"
            )
        )
