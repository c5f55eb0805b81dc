"""What is known of the public traces holds after reading them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import mean

import pytest

from gllm.trace import TraceRequest, load_trace, write_trace

# name, format, requests, duration in s (None: arrivals are drawn), mean prompt, mean output
FACTS = [
    ("azure2023_conv.csv.gz", "azure2023", 12_406, 2113.311412, 1243.61, 203.69),
    ("azure2023_code.csv.gz", "azure2023", 6_463, 2032.961123, 2040.61, 27.17),
    ("azure2025_multimodal_window.csv.gz", "azure2025", 2_000, 601.897, 2155.607, 148.4585),
    ("mooncake_conversation.jsonl.gz", "mooncake", 6_758, 2097.0, 12_592.1, 346.93),
    ("mooncake_arxiv_first1000.jsonl.gz", "mooncake", 1_000, 177.098, 9792.03, 199.084),
    ("qwen_traceA_chat0-31.jsonl.gz", "qwen", 32, 11.755, 2102.97, 300.19),
    ("burstgpt_1.csv.gz", "burstgpt", 269, 35_222.0, 597.71, 290.16),
    ("burstgpt_3.csv.gz", "burstgpt", 199, 36_447.0, 765.47, 180.35),
    ("vidur_splitwise_code.csv.gz", "vidur", 6_463, 2032.961123, 2040.61, 27.17),
    ("sharegpt_8k_lengths.csv.gz", "lengths", 20_000, None, 2344.74, 435.58),
    ("vidur_arxiv_summarization_lengths.csv.gz", "lengths", 28_257, None, 2588.08, 291.43),
]


@pytest.fixture(scope="module")
def load(public):
    traces = {}

    def cached(name):
        if name not in traces:
            traces[name] = load_trace(public(name), arrivals="poisson:10" if "lengths" in name else None)
        return traces[name]

    return cached


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_counts_durations_and_means(load, fact):
    name, format_name, num_requests, duration_s, prompt, output = fact
    trace = load(name)
    arrivals = [request.arrival_ns for request in trace.requests]
    assert trace.format == format_name
    assert trace.name == name.split(".")[0]
    assert len(trace.requests) == num_requests
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    if duration_s is not None:
        assert arrivals[-1] == round(duration_s * 1e9)
    assert mean(r.num_prompt_tokens for r in trace.requests) == pytest.approx(prompt, abs=0.01)
    assert mean(r.num_output_tokens for r in trace.requests) == pytest.approx(output, abs=0.01)


@pytest.mark.parametrize(
    ("name", "zipped"), [*((fact[0], "") for fact in FACTS), ("qwen_traceA_chat0-31.jsonl.gz", ".gz")]
)
def test_our_format_loses_nothing(load, tmp_path, name, zipped):
    trace = load(name)
    path = tmp_path / f"{trace.name}.jsonl{zipped}"
    write_trace(trace, path)
    again = load_trace(path)
    assert again.format == "gllm"
    assert again.name == trace.name
    assert again.notes == ()
    assert again.requests == trace.requests


def test_seven_digits_of_a_second_are_exact(load):
    first, second, third = load("azure2023_code.csv.gz").requests[:3]
    assert [first.arrival_ns, second.arrival_ns, third.arrival_ns] == [0, 52_000_000, 98_189_000]
    assert third.num_prompt_tokens == 110  # carriage returns and all


def test_vidurs_form_of_the_azure_trace_is_the_azure_trace(load):
    assert load("vidur_splitwise_code.csv.gz").requests == load("azure2023_code.csv.gz").requests


def test_multimodal_rows_keep_their_images_and_equal_times(load):
    requests = load("azure2025_multimodal_window.csv.gz").requests
    arrivals = [request.arrival_ns for request in requests]
    assert requests[0].extra == {"NumImages": "1"}
    assert max(request.num_prompt_tokens for request in requests) == 113_425
    assert sum(a == b for a, b in pairwise(arrivals)) == 98


@pytest.mark.parametrize(
    ("name", "share"), [("mooncake_conversation.jsonl.gz", 0.346), ("mooncake_arxiv_first1000.jsonl.gz", 0.380)]
)
def test_infinite_cache_hits_of_mooncake(load, name, share):
    trace = load(name)
    seen = Counter(number for request in trace.requests for number in request.hash_ids)
    hits = sum(seen.values()) - len(seen)
    assert hits / sum(seen.values()) == pytest.approx(share, abs=0.0005)


def test_mooncake_blocks_for_an_engine(load):
    requests = load("mooncake_conversation.jsonl.gz").requests
    assert all(len(r.hash_ids) == -(-r.num_prompt_tokens // 512) for r in requests)
    assert mean(len(r.block_hashes(16)) for r in requests) == pytest.approx(786.5, abs=0.1)
    assert all(len(r.block_hashes(16)) == r.num_prompt_tokens // 16 for r in requests[:500])


def test_qwen_ids_are_chained(load):
    """After chaining, an id determines all before it, as the README's contents did not."""
    requests = load("qwen_traceA_chat0-31.jsonl.gz").requests
    before: dict[int, tuple[int, ...]] = {}
    for request in requests:
        for place, number in enumerate(request.hash_ids):
            assert before.setdefault(number, request.hash_ids[:place]) == request.hash_ids[:place]
    assert requests[2].hash_ids[:45] == requests[0].hash_ids[:45]
    assert requests[2].hash_ids[45] != requests[0].hash_ids[45]
    assert requests[1].extra == {"chat_id": 1, "parent_chat_id": -1, "type": "image", "turn": 1}
    assert all(len(r.hash_ids) == -(-r.num_prompt_tokens // 16) for r in requests)


@pytest.mark.parametrize(("name", "num_failures"), [("burstgpt_1.csv.gz", 11), ("burstgpt_3.csv.gz", 1)])
def test_burstgpt_failures_are_skipped_and_counted(load, name, num_failures):
    assert load(name).notes == (f"rows skipped, since they have no prompt or no output: {num_failures}",)


def test_burstgpt_keeps_session_ids(load):
    extras = [request.extra for request in load("burstgpt_3.csv.gz").requests]
    assert extras[0]["Session ID"] == "1722ac82-0a46-4bf0-aa08-89794e7a2b3f"
    assert set(extras[0]) == {"Session ID", "Elapsed time", "Model", "Total tokens", "Log Type"}


def test_lengths_need_arrivals(public):
    with pytest.raises(ValueError, match=r"20,000 of 20,000 rows have no arrival time; .*--arrivals poisson:10"):
        load_trace(public("sharegpt_8k_lengths.csv.gz"))


def test_limit_reads_no_further(public, tmp_path):
    whole = public("azure2023_conv.csv.gz").read_bytes()
    torn = tmp_path / "torn.csv"  # not called .gz: the content tells
    torn.write_bytes(whole[: len(whole) // 2])
    assert len(load_trace(torn, limit=100).requests) == 100
    with pytest.raises(ValueError, match=r"torn\.csv, row \d+: the gzip data ends early"):
        load_trace(torn)


def test_requests_are_plain_values(load):
    assert all(
        type(r) is TraceRequest and type(r.hash_ids) is tuple for r in load("qwen_traceA_chat0-31.jsonl.gz").requests
    )
