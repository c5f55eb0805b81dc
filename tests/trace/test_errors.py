"""Bad input and bad options end in one line that names the file, the row and the remedy."""

from __future__ import annotations

import gzip
import io
import sys

import pytest

from gllm.trace import FORMATS, TraceError, list_samples, load_trace
from gllm.trace.lines import Lines

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
OWN = '{"gllm_trace":1}\n'
ROW = '"num_prompt_tokens":5,"num_output_tokens":1'


def message_of(source, **options):
    with pytest.raises(TraceError) as caught:
        load_trace(source, **options)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    return message


BAD_FILES = {
    "empty": ("", ": is empty"),
    "blank": ("\n \n\n", "is empty"),
    "header only": (AZURE, "has a header, but no rows"),
    "only failures": (VIDUR + "1,0,0\n", "only rows without a prompt or an output"),
    "no format": ("a,b\n1,2\n", "row 1: no format has such a first line; name one of gllm, "),
    "lacks a column": ("TIMESTAMP,ContextTokens\n", "the closest, azure2023, also needs GeneratedTokens"),
    "lacks a key": (
        '{"timestamp":1,"input_length":1,"hash_ids":[]}',
        "the closest, mooncake, also needs output_length",
    ),
    "repeated column": (VIDUR.replace("\n", ",x,x\n") + "1,1,1,1,1\n", "no format"),
    "short row": (VIDUR + "1,2,3\n\n1,2\n", "row 4: has 2 cells, the header 3"),
    "long row": (VIDUR + "1,2,3,4\n", "row 2: has 4 cells"),
    "negative": (VIDUR + "1,-2,3\n", "row 2: num_prefill_tokens is '-2'; it must be between 0 and"),
    "huge": (VIDUR + "1,2,99999999999\n", "num_decode_tokens is '99999999999'; it must be between"),
    "not a number": (VIDUR + "1,many,3\n", "num_prefill_tokens is 'many'; it must be a number"),
    "no number": (VIDUR + "1,,3\n", "num_prefill_tokens is ''; it must be a number"),
    "NaN": (VIDUR + "1,2,NaN\n", "num_decode_tokens is 'NaN'; it must be a number"),
    "fraction": (VIDUR + "1,2.5,3\n", "num_prefill_tokens is '2.5'; it must be a whole number"),
    "negative time": (VIDUR + "-1,2,3\n", "arrived_at is '-1'; a time must not be negative"),
    "endless time": (VIDUR + "1e99,2,3\n", "arrived_at is '1e99'; a time must not"),
    "no time": (AZURE + "yesterday,2,3\n", "row 2: TIMESTAMP is 'yesterday'; a time looks like"),
    "no such day": (AZURE + "2023-02-31 10:00:00,2,3\n", "TIMESTAMP is '2023-02-31 10:00:00'; a time looks like"),
    "far away": (AZURE + "9999-02-01 10:00:00,2,3\n", "between the years 1678 and 2262"),
    "torn zip": (gzip.compress((VIDUR + "1,2,3\n" * 999).encode())[:40], "the gzip data ends early"),
    "damaged zip": (gzip.compress(b"x" * 999)[:15] + b"\xff" * 40, "the gzip data is damaged"),
    "damaged zip header": (b"\x1f\x8b\x00" + b"\xff" * 40, "the gzip data is damaged"),
    "not UTF-8": (VIDUR.encode() + b"1,2,\xff\n", "row 2: byte 5 is not UTF-8"),
    "not JSON": ('{"timestamp":1,"input_length":1,"output_length":1,"hash_ids":[]}\n{"time', "row 2: is not JSON:"),
    "deep JSON": (OWN + "[" * 100_000, "row 2: is nested too deeply"),
    "ids not integers": (
        '{"timestamp":1,"input_length":1,"output_length":1,"hash_ids":[1.5]}',
        "row 1: hash_ids is [1.5]; it must be a list of integers",
    ),
    "key vanishes": (
        '{"timestamp":1,"input_length":1,"output_length":1,"hash_ids":[]}\n{"timestamp":1}',
        "row 2: has no input_length, output_length, hash_ids",
    ),
    "true is no length": (
        '{"timestamp":1,"input_length":true,"output_length":1,"hash_ids":[]}',
        "row 1: input_length is True; it must be a number",
    ),
    "other version": ('{"gllm_trace":2}\n', "row 1: gllm_trace is 2; this reader knows version 1"),
    "misspelt header": ('{"gllm_trace":1,"block":2}\n', "row 1: does not know the key 'block'"),
    "misspelt key": (
        OWN + f'{{{ROW},"prompt":1}}',
        "row 2: does not know the key 'prompt'; other data goes under extra",
    ),
    "no output": (OWN + '{"num_prompt_tokens":1}', "row 2: has no num_output_tokens"),
    "NaN in JSON": (OWN + f'{{{ROW},"extra":{{"x":NaN}}}}', "row 2: is not JSON: NaN is not a finite number"),
    "infinity in JSON": (OWN + f'{{{ROW},"extra":{{"x":1e999}}}}', "1e999 is not a finite number"),
    "not an object": (OWN + "[1]", "row 2: is [1]; every line must be a JSON object"),
    "ids of two sizes": (
        OWN
        + f'{{"arrival_ns":0,{ROW},"hash_ids":[1],"hash_block_size":16}}\n'
        + f'{{"arrival_ns":0,{ROW},"hash_ids":[1],"hash_block_size":512}}',
        "hash_block_size is 512, above it another",
    ),
    "ids without size": (OWN + f'{{"arrival_ns":0,{ROW},"hash_ids":[1]}}', "neither it nor the header says"),
    "backward run": (OWN + f'{{"arrival_ns":0,{ROW},"hash_ids":[[4,1]]}}', "list of integers and of runs"),
    "endless run": (OWN + f'{{"arrival_ns":0,{ROW},"hash_ids":[[0,9999999]]}}', "list of integers and of runs"),
    "ids not a list": (OWN + f'{{"arrival_ns":0,{ROW},"hash_ids":3}}', "list of integers and of runs"),
    "extra not an object": (OWN + f'{{{ROW},"extra":3}}', "extra is 3; it must be an object"),
    "arrival a float": (OWN + f'{{"arrival_ns":0.5,{ROW}}}', "arrival_ns is 0.5; it must be an integer of at least 0"),
    "no room for an answer": (
        OWN + f'{{{ROW},"max_tokens":0}}',
        "max_tokens is 0; it must be an integer of at least 1",
    ),
    "priority not a number": (OWN + f'{{{ROW},"priority":"high"}}', "priority is 'high'; it must be an integer below"),
    "some times missing": (OWN + f'{{"arrival_ns":0,{ROW}}}\n{{{ROW}}}', "1 of 2 rows have no arrival time"),
    "cell too long": (VIDUR + "1,2," + "3" * 200_000, "is not comma-separated text"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(trace_file, case):
    content, expected = BAD_FILES[case]
    path = trace_file(content)
    message = message_of(path)
    assert message.startswith(str(path))
    assert expected in message


def test_a_repeated_column_of_a_named_format(trace_file):
    path = trace_file(VIDUR.replace("\n", ",x,x\n") + "1,1,1,1,1\n")
    assert "vidur needs" in message_of(path, format="vidur")


def test_missing_file_lists_the_samples(tmp_path):
    message = message_of(tmp_path / "nowhere.csv")
    assert message.startswith(f"{tmp_path / 'nowhere.csv'}: no such file, and no such sample")
    assert all(sample.name in message for sample in list_samples())


def test_what_cannot_be_opened(tmp_path):
    assert "cannot be opened" in message_of(tmp_path)
    assert "cannot be opened: embedded null byte" in message_of("a\0b")


def test_what_cannot_be_read_to_its_end():
    def failing():
        yield b"one\n"
        raise OSError(5, "Input/output error")

    lines = Lines(failing(), "pipe")
    assert next(lines) == "one"
    with pytest.raises(TraceError, match="cannot be read: Input/output error"):
        next(lines)


def test_empty_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b""))))
    assert message_of("-") == "standard input: is empty; a trace has a row for each request"


def test_unknown_format_lists_the_known(trace_file):
    message = message_of(trace_file(VIDUR + "1,1,1\n"), format="parquet")
    assert "unknown format 'parquet'" in message
    assert all(name in message for name in FORMATS)


def test_format_that_the_file_is_not(trace_file):
    path = trace_file(VIDUR + "1,1,1\n")
    assert "row 1: format azure2023 needs TIMESTAMP, ContextTokens, GeneratedTokens" in message_of(
        path, format="azure2023"
    )
    assert "format gllm needs gllm_trace" in message_of(path, format="gllm")
    assert "format qwen needs chat_id" in message_of(path, format="qwen")


BAD_OPTIONS = [
    ({"window": "5"}, "window '5' has no colon"),
    ({"window": ""}, "window '' has no colon"),
    ({"arrivals": ""}, "arrivals '' are unknown"),
    ({"window": "20:10"}, "window '20:10' ends before it starts"),
    ({"window": "10:10"}, "ends before it starts"),
    ({"window": "a:b"}, "the window's start is 'a'; it must be a number"),
    ({"window": "-5:"}, "the window's start is '-5'; a time must not be negative"),
    ({"window": "nan:"}, "the window's start is 'nan'; it must be a number"),
    ({"window": "50:60"}, "the window holds none of 2 requests; the last arrives at 9.000 s"),
    ({"limit": 0}, "limit is 0"),
    ({"repeat": -1}, "repeat is -1"),
    ({"repeat": 0}, "repeat is 0; it must be at least 1, or 0 with a limit"),
    ({"rate_scale": 0}, "rate_scale is 0"),
    ({"rate_scale": -2.0}, "rate_scale is -2.0"),
    ({"rate_scale": float("nan")}, "rate_scale is nan"),
    ({"rate_scale": float("inf")}, "rate_scale is inf"),
    ({"max_total_tokens": 1}, "max_total_tokens is 1"),
    ({"arrivals": "poison:3"}, "arrivals 'poison:3' are unknown; write poisson:10"),
    ({"arrivals": "poisson"}, "arrivals 'poisson' are unknown"),
    ({"arrivals": "poisson:0"}, "the rate is '0'; it must be a number from"),
    ({"arrivals": "poisson:nan"}, "the rate is 'nan'"),
    ({"arrivals": "poisson:fast"}, "the rate is 'fast'"),
    ({"arrivals": "gamma:3"}, "arrivals 'gamma:3' are unknown"),
    ({"arrivals": "gamma:3:0"}, "the CV is '0'"),
    ({"arrivals": "burst:3"}, "arrivals 'burst:3' are unknown"),
]


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS, ids=str)
def test_bad_options(trace_file, options, expected):
    assert expected in message_of(trace_file(VIDUR + "1,1,1\n10,1,1\n"), **options)


def test_a_trace_of_centuries_is_refused(trace_file):
    path = trace_file(VIDUR + "0,1,1\n9e9,1,1\n")
    assert "292 years" in message_of(path, rate_scale=0.1)
