"""The options of `load_trace`, one by one and together."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm.trace import Arrivals, load_trace, parse_arrivals

NS_PER_S = 10**9
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
TEN = VIDUR + "".join(f"{100 + 2 * n},{n + 1},10\n" for n in range(10))  # every 2 s
LENGTHS = "num_prefill_tokens,num_decode_tokens\n" + "".join(f"{n + 1},10\n" for n in range(10))
DEADLINE = (
    '{"gllm_trace":1}\n'
    '{"arrival_ns":5000,"num_prompt_tokens":50,"num_output_tokens":50,"deadline_ns":5700,"max_tokens":60}\n'
    '{"arrival_ns":9000,"num_prompt_tokens":50,"num_output_tokens":5,"deadline_ns":9100}\n'
)


def seconds(trace):
    return [request.arrival_ns / NS_PER_S for request in trace.requests]


def prompts(trace):
    return [request.num_prompt_tokens for request in trace.requests]


def test_limit_takes_the_first_rows_that_can_be_served(trace_file):
    text = VIDUR + "0,0,0\n1,1,1\n2,2,2\n3,3,3\nnonsense"
    trace = load_trace(trace_file(text), limit=3)
    assert prompts(trace) == [1, 2, 3]
    assert trace.notes == ("rows skipped, since they have no prompt or no output: 1",)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (":", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("4:10", [3, 4, 5]),  # the end is not in it
        ("3.5:", [3, 4, 5, 6, 7, 8, 9, 10]),
        (":2.000000001", [1, 2]),
        (" 18 : ", [10]),
    ],
)
def test_window_counts_from_the_traces_start(trace_file, window, expected):
    trace = load_trace(trace_file(TEN), window=window)
    assert prompts(trace) == expected
    assert seconds(trace) == [2 * n for n in range(len(expected))]


def test_rate_scale_compresses_time(trace_file):
    assert seconds(load_trace(trace_file(TEN), rate_scale=4)) == [0.5 * n for n in range(10)]
    assert seconds(load_trace(trace_file(TEN), rate_scale=0.5, window="4:10")) == [0, 4, 8]


def test_repeat_goes_round_a_mean_gap_later(trace_file):
    trace = load_trace(trace_file(TEN), repeat=3)
    assert prompts(trace) == list(range(1, 11)) * 3
    assert seconds(trace) == [2 * n for n in range(30)]


def test_repeat_fills_a_limit(trace_file):
    trace = load_trace(trace_file(TEN), repeat=0, limit=23)
    assert prompts(trace) == [n % 10 + 1 for n in range(23)]
    assert prompts(load_trace(trace_file(TEN), repeat=2, limit=100)) == list(range(1, 11)) * 2
    assert prompts(load_trace(trace_file(TEN), repeat=0, limit=3)) == [1, 2, 3]
    assert prompts(load_trace(trace_file(TEN), repeat=0, limit=5, window="4:8")) == [3, 4, 3, 4, 3]
    assert seconds(load_trace(trace_file(VIDUR + "7,1,1\n"), repeat=3)) == [0, 0, 0]


def test_lengths_are_repeated_before_times_are_drawn(trace_file):
    trace = load_trace(trace_file(LENGTHS), repeat=0, limit=500, arrivals="poisson:10", seed=4)
    assert len(trace.requests) == 500
    assert seconds(trace)[-1] == pytest.approx(50, rel=0.2)
    assert trace.notes == ("arrivals drawn: poisson:10, seed 4",)


def test_drawn_arrivals_replace_the_files(trace_file):
    path = trace_file(TEN)
    drawn = load_trace(path, arrivals="gamma:10:3", seed=1, window="4:10")
    assert prompts(drawn) == [3, 4, 5]  # the window is of the file's own times
    assert seconds(drawn) != [0, 2, 4]
    assert load_trace(path, arrivals="burst").requests[-1].arrival_ns == 0
    assert drawn == load_trace(path, arrivals="gamma:10:3", seed=1, window="4:10")
    assert drawn != load_trace(path, arrivals="gamma:10:3", seed=2, window="4:10")


def test_a_window_of_drawn_times(trace_file):
    trace = load_trace(trace_file(LENGTHS), repeat=0, limit=1000, arrivals="poisson:10", window="10:20")
    assert 60 < len(trace.requests) < 140
    assert trace.requests[0].arrival_ns == 0


def test_deadlines_move_with_their_arrivals(trace_file):
    path = trace_file(DEADLINE)
    for options in ({}, {"rate_scale": 2}, {"arrivals": "poisson:3"}, {"window": "0.000003:"}, {"repeat": 2}):
        for request in load_trace(path, **options).requests:
            assert request.deadline_ns - request.arrival_ns in {700, 100}


def test_clipping_takes_from_the_output_first(trace_file):
    path = trace_file(DEADLINE)
    clipped = load_trace(path, max_total_tokens=60)
    assert [(r.num_prompt_tokens, r.num_output_tokens, r.max_tokens) for r in clipped.requests] == [
        (50, 10, 10),
        (50, 5, None),
    ]
    assert clipped.notes == ("requests clipped to 60 tokens in total: 1 of 2",)
    tiny = load_trace(path, max_total_tokens=2)
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in tiny.requests} == {(1, 1)}
    assert load_trace(path, max_total_tokens=100).notes == ()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 400))
def test_clipping_keeps_both_lengths_positive(num_prompt_tokens, num_output_tokens, total):
    from gllm.trace import TraceRequest
    from gllm.trace.shape import clipped

    request = TraceRequest(arrival_ns=0, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)
    (clip,) = clipped([request], total, [])
    assert 1 <= clip.num_prompt_tokens <= num_prompt_tokens
    assert 1 <= clip.num_output_tokens <= num_output_tokens
    assert clip.num_prompt_tokens + clip.num_output_tokens == min(total, num_prompt_tokens + num_output_tokens)


@pytest.mark.parametrize(("text", "cv"), [("poisson:20", 1.0), ("gamma:20:0.5", 0.5), ("gamma:20:3", 3.0)])
def test_drawn_gaps_have_the_mean_and_variation_asked_for(text, cv):
    times = parse_arrivals(text).times(40_000, seed=5)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert mean(gaps) / NS_PER_S == pytest.approx(1 / 20, rel=0.05)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv, rel=0.05)


def test_poisson_is_gamma_of_variation_one():
    assert parse_arrivals("poisson:2") == Arrivals(rate_per_s=2) == parse_arrivals("gamma:2:1")
    assert parse_arrivals("burst").times(3, seed=0) == [0, 0, 0]
