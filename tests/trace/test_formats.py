"""Every quirk of the formats, on rows written here."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys

import pytest

from gllm.trace import FORMATS, load_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319601,3180,8"
)
AZURE_2025 = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-16T08:36:32.709Z,1,3324,170\n"
BURST_1 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,472,18,490,Conversation log\n"
BURST_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19440110.0,,43,GPT-4,906,446,1352,API log\n"
    "19440110.25,,43,GPT-4,0,0,0,API log\n"
    "19440110.5,,4,GPT-4,7,6,13,API log\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,2\n5e-07,20,3\n0.098189,110,27\n"
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n"
MOONCAKE = '{"timestamp": 27482, "input_length": 600, "output_length": 5, "hash_ids": [46, 47]}\n'
QWEN = "".join(
    json.dumps(
        {"chat_id": n, "parent_chat_id": -1, "timestamp": 0.206 * n, "input_length": 40, "output_length": 2}
        | {"type": "text", "turn": 1, "hash_ids": ids}
    )
    + "\n"
    for n, ids in enumerate([[5, 6, 7], [5, 6, 8], [6, 7, 7]])
)
OWN = (
    '{"gllm_trace":1,"hash_block_size":16}\n'
    '{"arrival_ns":0,"num_prompt_tokens":40,"num_output_tokens":1,"hash_ids":[3,[7,8]]}\n'
)

TEXTS = {
    "azure2023": AZURE,
    "azure2025": AZURE_2025,
    "burstgpt": BURST_3,
    "vidur": VIDUR,
    "lengths": LENGTHS,
    "mooncake": MOONCAKE,
    "qwen": QWEN,
    "gllm": OWN,
}


def drawn(name):
    return {"arrivals": "burst"} if name == "lengths" else {}


def test_every_format_is_tried_here():
    assert set(TEXTS) == set(FORMATS)


@pytest.mark.parametrize("name", TEXTS)
def test_detected_or_told_it_is_the_same(trace_file, name):
    path = trace_file(TEXTS[name])
    found = load_trace(path, **drawn(name))
    assert found.format == name
    assert found == load_trace(path, format=name, **drawn(name))


@pytest.mark.parametrize("name", TEXTS)
def test_line_ends_marks_and_zip_change_nothing(trace_file, name):
    text = TEXTS[name].replace("\r\n", "\n").strip("\n")
    plain = load_trace(trace_file(text), **drawn(name))
    for variant in (
        text.replace("\n", "\r\n"),
        text + "\n\n \r\n\n",
        "\ufeff" + text + "\n",
        gzip.compress(text.encode()),
        gzip.compress(text[:50].encode()) + gzip.compress(text[50:].encode()),
    ):
        assert load_trace(trace_file(variant), **drawn(name)) == plain


def test_azure_fractions_and_zones(trace_file):
    assert [r.arrival_ns for r in load_trace(trace_file(AZURE)).requests] == [0, 52_000_100]
    zoned = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,1\n"
        "2024-05-10 02:00:01+02:00,2,2\n2024-05-10T00:00:02.000000001Z,3,3\n"
    )
    assert [r.arrival_ns for r in load_trace(trace_file(zoned)).requests] == [0, 990_070_000, 1_990_070_001]


def test_burstgpt_both_headers_and_failures(trace_file):
    one = load_trace(trace_file(BURST_1)).requests[0]
    assert (one.num_prompt_tokens, one.num_output_tokens) == (472, 18)
    three = load_trace(trace_file(BURST_3))
    assert [r.arrival_ns for r in three.requests] == [0, 500_000_000]
    assert three.notes == ("rows skipped, since they have no prompt or no output: 1",)
    assert three.requests[0].extra["Session ID"] == ""


def test_decimal_times_are_exact(trace_file):
    assert [r.arrival_ns for r in load_trace(trace_file(VIDUR)).requests] == [0, 500, 98_189_000]


def test_mooncake_counts_milliseconds(trace_file):
    text = MOONCAKE + MOONCAKE.replace("27482", "27483.5")
    first, second = load_trace(trace_file(text)).requests
    assert (first.arrival_ns, second.arrival_ns) == (0, 1_500_000)
    assert (first.hash_ids, first.hash_block_size) == ((46, 47), 512)


def test_qwen_contents_become_prefixes(trace_file):
    ids = [r.hash_ids for r in load_trace(trace_file(QWEN)).requests]
    assert ids == [(0, 1, 2), (0, 1, 3), (4, 5, 6)]


def test_own_runs_are_spelt_out(trace_file):
    assert load_trace(trace_file(OWN)).requests[0].hash_ids == (3, 7, 8)


def test_whole_numbers_in_a_spreadsheets_clothes(trace_file):
    request = load_trace(trace_file(VIDUR.replace("0.0,10,2", "0.0, 10.0,2 "))).requests[0]
    assert (request.num_prompt_tokens, request.num_output_tokens) == (10, 2)


def test_quoted_cells(trace_file):
    text = BURST_1.replace("Conversation log", '"Conversation, log"')
    assert load_trace(trace_file(text)).requests[0].extra["Log Type"] == "Conversation, log"


def test_rows_out_of_order_are_sorted_and_counted(trace_file):
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n3,1,1\n1,2,1\n2,3,1\n1,4,1\n"
    trace = load_trace(trace_file(text))
    assert [(r.arrival_ns // 10**9, r.num_prompt_tokens) for r in trace.requests] == [(0, 2), (0, 4), (1, 3), (2, 1)]
    assert trace.notes == ("rows that came before their predecessor, now sorted by arrival: 2 of 4",)


@pytest.mark.parametrize("content", [MOONCAKE.encode(), gzip.compress(MOONCAKE.encode())], ids=["plain", "zipped"])
def test_standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    trace = load_trace("-")
    assert (trace.name, trace.format, len(trace.requests)) == ("stdin", "mooncake", 1)


def test_it_loads_the_standard_library_alone():
    code = f"import sys; sys.path[:0] = {sys.path!r}; before = set(sys.modules); import gllm.trace; "
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own line
    assert done.stdout.split() == ["gllm"]
