"""The benchmark scripts: their workloads and formulas, and each of them run small on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from runtime.servers import Serving, free_port

from gllm.model_shape import list_shapes, load_shape
from gllm.runtime.model_config import load_model_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))
try:
    from decode_step import NUM_PROFILED, Batch, Span, by_kind
    from edges import SENT_ROWS, STEP_ROWS, combine
    from engines.gllm import with_budget
    from latency import bytes_per_step
    from model_folder import model_folder
    from openai_stream import Answer, EventReader, endpoint_of
    from prompt_step import PRODUCTS, MixedBatch, product_flop, products
    from record import slug
    from serving import statistics as percentiles
    from traffic import drawn_times
    from workloads import make_workload
finally:
    sys.path.remove(str(BENCHMARKS))


def script(name, *args, status=0):
    """Run a benchmark; what it wrote on standard output and on standard error."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)  # noqa: S603
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def only_result(folder):
    """The one result file of a folder."""
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


# Workloads and models


def test_workloads_have_the_known_totals():
    totals = {name: make_workload(name) for name in ("nano256", "chat1024")}
    assert [(each.num_input_tokens, each.num_output_tokens) for each in totals.values()] == [
        (144_831, 144_160),
        (249_277, 201_106),
    ]
    assert len(totals["nano256"].prompts) == 256
    assert len(totals["chat1024"].num_outputs) == 1024
    for workload in totals.values():
        assert min(map(min, workload.prompts)) >= 100
        assert max(map(max, workload.prompts)) <= 10_000
    assert totals["nano256"].longest == 2044


def test_a_scaled_workload_keeps_its_beginnings():
    whole, short = make_workload("nano8"), make_workload("nano8", scale=0.1, vocab_size=264)
    for prompt, beginning in zip(whole.prompts, short.prompts, strict=True):
        assert beginning == [token_id % 264 for token_id in prompt[: len(prompt) // 10]]
    assert short.num_outputs == [count // 10 for count in whole.num_outputs]


@pytest.mark.parametrize("name", ["nano", "nano0", "8", "other8", "nano8x", "nano99999999"])
def test_unknown_workloads_are_refused(name):
    with pytest.raises(ValueError, match="--workload"):
        make_workload(name)


@pytest.mark.parametrize("name", list_shapes())
def test_a_shape_becomes_a_folder_that_gllm_reads_back(name):
    with model_folder(name) as folder:
        config = load_model_config(folder)
        shape = load_shape(name)
        assert config.shape.total_params == shape.total_params
        assert dataclasses.replace(config.shape, name="", architecture="") == dataclasses.replace(
            shape, name="", architecture=""
        )
        assert config.dtype == "bfloat16"
        assert folder.name == name
    assert not folder.exists()


def test_a_hub_name_is_a_shape_and_nonsense_is_not():
    with model_folder("Qwen/Qwen3-8B") as folder:
        assert load_model_config(folder).shape.hidden_size == 4096
    with pytest.raises(ValueError, match="neither a folder"), model_folder("no-such-model"):
        pass


# Formulas


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("sarathi", "sarathi:token_budget=8192"),
        ("sarathi:token_budget=512", "sarathi:token_budget=512"),
        ("throttle", "throttle:max_prefill=7680"),
        ("throttle:ut=false", "throttle:max_prefill=7680,ut=false"),
        ("throttle:max_prefill=100", "throttle:max_prefill=100"),
        ("orca", "orca"),
    ],
)
def test_the_token_budget_becomes_the_policys(spec, whole):
    assert with_budget(spec, 8192, 512) == whole


def test_a_decode_step_reads_weights_and_keys():
    dense = load_shape("qwen3-8b")
    no_table = dense.total_params - dense.embedding_params  # the head is one of its own
    assert bytes_per_step(dense, 1, 0) == 2 * no_table
    kv_bytes = 2 * 2 * 8 * 128 * 36  # key and value, 2 bytes, 8 heads of 128, 36 layers
    assert bytes_per_step(dense, 3, 100) - bytes_per_step(dense, 3, 0) == 3 * 100 * kv_bytes
    tied = load_shape("qwen3-0.6b")
    assert bytes_per_step(tied, 1, 0) == 2 * tied.total_params
    moe = load_shape("qwen3-30b-a3b")
    idle = 48 * (128 - 8) * moe.expert_params
    assert bytes_per_step(moe, 1, 0) == pytest.approx(2 * (moe.total_params - moe.embedding_params - idle))
    assert bytes_per_step(moe, 4096, 0) == pytest.approx(2 * (moe.total_params - moe.embedding_params))


@pytest.mark.parametrize("num_decodes", [0, 3])
def test_a_prompt_step_is_whole(num_decodes):
    step = MixedBatch(1100, 512, Batch(num_decodes, 100), num_blocks=100).step()
    assert [(chunk.slot - num_decodes, chunk.start, chunk.num_tokens, chunk.final) for chunk in step.chunks] == [
        (0, 0, 512, True),
        (1, 0, 512, True),
        (2, 0, 76, True),
    ]
    assert step.num_decodes == num_decodes
    assert [len(admission.token_ids) for admission in step.admissions] == [512, 512, 76]
    blocks = [block for chunk in step.chunks for block in chunk.blocks]
    assert sorted(blocks) == list(range(100 - 32 - 32 - 5, 100))


def test_products_are_told_apart():
    shape = load_shape("qwen3-8b")
    weights = shape.num_layers * sum(product_flop(shape)) // 2
    outside = 2 * shape.embedding_params + (4 * shape.num_layers + 1) * shape.hidden_size
    assert weights == pytest.approx(shape.total_params - outside, rel=1e-4), "the rest are norms"
    spans, now = [], 0.0
    for _ in range(NUM_PROFILED):
        for duration in (10.0, 20.0, 30.0, 40.0) * shape.num_layers + (50.0,):
            spans += [Span("nvjet_gemm", now, now + duration), Span("_rms_norm_kernel", now + duration, now + duration)]
            now += duration
    found = products(spans, shape, num_tokens=100)
    assert [(each["product"], each["us"]) for each in found] == list(zip(PRODUCTS, (10, 20, 30, 40), strict=True))
    assert found[3]["tflop_per_s"] == pytest.approx(2 * 12288 * 4096 * 100 / 40e-6 / 1e12, abs=0.05)
    assert products(spans[:-2], shape, num_tokens=100) == []


def test_a_kernel_that_waits_for_the_one_ahead_is_not_counted_twice():
    spans = [
        Span("_rms_norm_kernel", 0.0, 4.0),
        Span("_few_rows_kernel", 1.0, 10.0),
        Span("_decode_kernel", 12.0, 20.0),
    ]
    found = by_kind(spans)
    shares = [found[kind] * NUM_PROFILED for kind in ("norm, rotary, cache", "matrix products", "attention", "gaps")]
    assert shares == [4.0, 6.0, 8.0, 2.0]


def test_arrivals_have_the_rate_and_the_burstiness():
    assert drawn_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    for burstiness in (0.25, 1.0, 4.0):
        gaps = [later - earlier for earlier, later in pairwise(drawn_times(20_001, 10.0, burstiness, 1))]
        assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
        assert statistics.stdev(gaps) == pytest.approx(0.1 / math.sqrt(burstiness), rel=0.05)


def test_statistics_carry_vllms_names():
    found = percentiles("ttft", [1.0, 2.0, 3.0, 4.0], (50.0, 99.9))
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == 2.5
    assert found["p99.9_ttft_ms"] == pytest.approx(3.997)
    assert set(percentiles("itl", [], (99.0,)).values()) == {None}


def test_file_names():
    assert slug("throughput", "gllm", "Qwen3-8B", "", "NVIDIA H200") == "throughput_gllm_qwen3-8b_nvidia-h200"
    assert (BENCHMARKS / "results" / f"ceilings_{slug('NVIDIA H200')}.json").is_file()


# Streams


EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"\xc3\xa9"},"logprobs":null}]}\n\n',
    b": a comment\n\n",
    b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"length"}]}\r\n\r\n',
    b'data: {"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}\n\n',
    b"data: [DONE]\n\n",
)


def test_a_stream_is_read_however_it_is_cut():
    stream = b"".join(EVENTS)
    for cut in range(len(stream)):
        answer = Answer(0.0)
        reader = EventReader(answer)
        reader.feed(stream[:cut], 1.0)
        reader.feed(stream[cut:], 2.0)
        assert reader.is_done
        assert answer.error is None
        assert (len(answer.token_s), answer.num_prompt_tokens, answer.num_output_tokens) == (2, 7, 3)
        assert answer.num_cached_tokens == 4
        assert answer.end_s in (1.0, 2.0)


def test_latencies_follow_from_the_times_of_events():
    answer = Answer(10.0)
    reader = EventReader(answer)
    for number, event in enumerate(EVENTS):
        reader.feed(event, 11.0 + number)
    assert (answer.ttft_s, answer.e2e_s, answer.tpot_s) == (2.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (b'data: {"error":{"message":"the engine died"}}\n\n', "the engine died"),
        (b"data: {nonsense\n\n", "not a chunk"),
        (b'data: {"choices":7}\n\n', "not a chunk"),
    ],
)
def test_what_is_wrong_in_a_stream_is_kept(part, error):
    answer = Answer(0.0)
    EventReader(answer).feed(part, 1.0)
    assert error in answer.error


def test_base_urls():
    for text in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert endpoint_of(text).url == "http://a:1"
    assert endpoint_of("https://a/x/v1", "key")[1:4] == (443, True, "/x")
    for text in ("a:1", "ftp://a", "http://", "http://a:x"):
        with pytest.raises(ValueError, match="--base-url"):
            endpoint_of(text)


# Offline


def test_throughput(tmp_path):
    out, _ = script("throughput", "--workload", "nano8,chat2", "--scale", "0.02", "--out", tmp_path)
    result = only_result(tmp_path)
    assert "output tok/s" in out
    assert {"date", "command", "machine", "start_s", "options", "engine", "model", "backend"} <= set(result)
    assert {"python", "torch", "triton", "gllm"} <= set(result["machine"]["versions"])
    assert (result["backend"], result["model"]) == ("gllm", "gllm-demo")
    assert [(run["workload"], run["repetition"]) for run in result["runs"]] == [
        ("nano8", 0),
        ("nano8", 1),
        ("chat2", 0),
        ("chat2", 1),
    ]
    expected = make_workload("nano8", scale=0.02)
    for run in result["runs"][:2]:
        assert run["num_input_tokens"] == expected.num_input_tokens
        assert run["num_output_tokens"] == expected.num_output_tokens
        assert run["output_tokens_per_s"] == pytest.approx(expected.num_output_tokens / run["seconds"], rel=0.01)


def test_throughput_of_transformers(tmp_path):
    args = ("--backend", "transformers", "--workload", "nano8", "--scale", "0.02", "--repetitions", "1")
    script("throughput", *args, "--max-num-seqs", "3", "--out", tmp_path)
    result = only_result(tmp_path)
    assert result["runs"][0]["num_output_tokens"] == make_workload("nano8", scale=0.02).num_output_tokens
    assert result["engine"]["num_batches"] == 1 + 3  # the first request, then 8 in batches of 3


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("throughput", ("--workload", "nano"), "--workload"),
        ("throughput", ("--workload", "chat1024"), "--scale"),
        ("throughput", ("no-such-model",), "no-such-model"),
        ("throughput", ("--backend", "transformers", "--pp", "2"), "--pp"),
        ("throughput", ("--policy", "unknown", "--workload", "nano1"), "unknown"),
        ("throughput", ("--engine-option", "cuda_graphs", "--workload", "nano1"), "--engine-option"),
        ("throughput", ("--engine-option", "no_such=1", "--workload", "nano1"), "no_such"),
        ("throughput", ("--engine-option", "block_size=x", "--workload", "nano1"), "block_size"),
        ("latency", ("--batch-sizes", "1,1000"), "--batch-sizes"),
        ("latency", ("--input-len", "4000"), "--input-len"),
        ("prefix", ("--system-len", "4000"), "--system-len"),
        ("serving", ("--base-url", "nowhere"), "--base-url"),
        ("serving", ("--goodput", "ttft"), "--goodput"),
        ("serving", ("--trace-times",), "--trace"),
        ("serving", ("--trace", "no-such-trace"), "no-such-trace"),
    ],
)
def test_bad_input_ends_in_one_line(name, args, reason):
    out, err = script(name, *args, status=2)
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("gllm: error: ")
    assert reason in line


@pytest.mark.parametrize("name", ["throughput", "latency", "serving", "prefix", "edges"])
def test_help_needs_nothing(name):
    out, _ = script(name, "--help")
    assert "python benchmarks/" in out


def test_what_an_edge_costs():
    """The worse end counts, and each number comes from the end that measured it."""
    sent = {rows: {"bytes": rows, "latency_us": 10.0, "ready_us": 0.0} for rows in SENT_ROWS}
    sender = {"steps": {rows: {"alone_us": 100.0, "sender_us": 105.0} for rows in STEP_ROWS}, "sent": sent}
    received = {rows: {"bytes": rows, "latency_us": 0.0, "ready_us": 7.0} for rows in SENT_ROWS}
    receiver = {"steps": {rows: {"alone_us": 200.0, "receiver_us": 230.0} for rows in STEP_ROWS}, "sent": received}
    for step in (*sender["steps"].values(), *receiver["steps"].values()):
        step |= {key: 0.0 for key in ("sender_us", "receiver_us") if key not in step}
    result = combine(sender | {"activities": []}, receiver)
    assert result["slower_by"] == pytest.approx(0.2)  # (230 - 200 + 10) / 200
    assert [each["ready_us"] for each in result["sent"].values()] == [7.0] * 3
    for step in sender["steps"].values():
        step["sender_us"] = 150.0
    assert combine(sender | {"activities": []}, receiver)["slower_by"] == pytest.approx(0.5)


def test_latency(tmp_path):
    args = ("--batch-sizes", "1,3", "--input-len", "5", "--output-len", "12", "--repetitions", "1")
    args += ("--engine-option", "block_size=32")
    out, _ = script("latency", *args, "--out", tmp_path)
    result = only_result(tmp_path)
    assert "prefill ms" in out
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 3]
    for batch in result["batches"]:
        assert batch["prefill_s"] > 0
        slope = (batch["all_whole_s"][0] - batch["all_prefill_s"][0]) / 12
        assert batch["step_s"] == pytest.approx(slope)
        assert (batch["share_of_copy"] is None) == ("gpus" not in result["machine"])  # a CPU has no ceiling
        assert batch["bytes_per_s"] == pytest.approx(batch["bytes_per_step"] / batch["step_s"])
    assert result["engine"]["policy"] == "sarathi:token_budget=8192"
    assert result["options"]["engine"] == {"block_size": 32}


def test_prefix_offline(tmp_path):
    args = ("--users", "3", "--rounds", "2", "--system-len", "96", "--message-len", "16", "--answer-len", "16")
    out, _ = script("prefix", *args, "--out", tmp_path)
    result = only_result(tmp_path)
    assert "hit rate" in out
    assert result["off"]["hit_rate"] == 0
    assert result["on"]["hit_rate"] > 0.5
    for mode in ("on", "off"):
        assert [each["num_prompt_tokens"] for each in result[mode]["rounds"]] == [3 * 112, 3 * 144]
        assert result[mode]["seconds"] > 0
    first, second = (each["num_cached_tokens"] for each in result["on"]["rounds"])
    assert first == 2 * 96  # the first user fills the cache, in the same batch
    assert second == 3 * 112  # all but the new message and the last answer's unfilled block


# Against servers


@pytest.fixture(scope="module")
def server():
    with Serving() as serving:
        yield serving.ready()


SHORT = ("--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "8", "--vocab-size", "256", "--quiet")


def test_serving(server, tmp_path):
    file = tmp_path / "result.json"
    args = ("--ignore-eos", "--goodput", "ttft:60000", "e2e:60000", "--save-detailed", "--save-result", file)
    out, err = script("serving", "--base-url", server.url, *SHORT, "--random-range-ratio", "0.5", *args)
    assert not err
    for label in (
        "Successful requests:",
        "Failed requests:",
        "Benchmark duration (s):",
        "Total input tokens:",
        "Total generated tokens:",
        "Request throughput (req/s):",
        "Request goodput (req/s):",
        "Output token throughput (tok/s):",
        *(f"{figure} {name} (ms):" for figure in ("Mean", "Median", "P99") for name in ("TTFT", "TPOT", "ITL", "E2EL")),
    ):
        assert label in out
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"], result["errors"]) == (6, 0, {})
    assert 6 * 10 <= result["total_input_tokens"] <= 6 * 30
    assert result["total_output_tokens"] == sum(each["output_tokens"] for each in result["requests"])
    assert result["request_goodput"] == result["request_throughput"]
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]  # a busy client may read a whole answer at once
    assert result["output_throughput"] == pytest.approx(result["total_output_tokens"] / result["duration"])


def test_serving_limits_what_runs_at_once(server):
    out, _ = script("serving", "--base-url", f"{server.url}/v1", *SHORT, "--max-concurrency", "2")
    figures = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if ": " in line)
    assert figures["Peak concurrent requests:"] == "2"
    assert figures["Successful requests:"] == "6"


def test_serving_tells_of_prompts_that_were_there_before(server):
    cold, warm = (
        script("serving", "--base-url", server.url, *SHORT, "--seed", "77", "--random-input-len", "64")[0]
        for _ in range(2)
    )
    assert "Of these found in a cache:" not in cold
    assert re.search(r"Of these found in a cache: +[1-9]", warm)


def test_serving_a_chat_and_a_trace(server):
    out, _ = script("serving", "--base-url", server.url, *SHORT, "--endpoint", "chat", "--percentile-metrics", "ttft")
    assert "Mean TTFT" in out
    assert "TPOT" not in out
    trace = ("--trace", "chat", "--trace-times", "--rate-scale", "50", "--max-total-tokens", "100")
    out, err = script("serving", "--base-url", server.url, *SHORT, *trace)
    assert "Total input tokens:" in out
    assert not err


def test_a_warm_up_that_fails_says_why(server):
    _, err = script("serving", "--base-url", server.url, "--num-prompts", "1", "--quiet", status=1)
    assert "outside the model's vocabulary" in err
    assert len(err.splitlines()) == 1


def test_prefix_against_a_server(server, tmp_path):
    args = ("--users", "2", "--rounds", "2", "--system-len", "64", "--message-len", "16", "--answer-len", "8")
    script("prefix", "gllm-demo", "--base-url", server.url, "--vocab-size", "256", *args, "--out", tmp_path)
    result = only_result(tmp_path)
    assert result["off"]["hit_rate"] == 0
    assert result["on"]["hit_rate"] > 0.5


@pytest.mark.parametrize("model", [(), ("--model", "any")])
def test_no_server_is_one_line(model):
    url = f"http://127.0.0.1:{free_port()}"
    out, err = script("serving", "--base-url", url, *model, "--quiet", status=1)
    assert not out
    (line,) = err.splitlines()
    assert url in line
    assert "no server answers there" in line


@contextlib.contextmanager
def faulty_server(num_good):
    """A server that answers so many requests and refuses all others."""
    lock, seen = threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                seen.append(self.path)
                good = len(seen) <= num_good
            body = b'{"error":{"message":"too many\\nrequests"}}'
            if good:
                parts = (b'{"choices":[{"text":"a"}]}', b'{"choices":[{"text":"b"}]}', b"[DONE]")
                body = b"".join(b"data: %s\r\n\r\n" % part for part in parts)
            self.send_response(200 if good else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("num_good", "status"), [(4, 0), (0, 1)])
def test_failed_requests_are_counted_with_an_example(num_good, status):
    with faulty_server(num_good) as url:
        out, err = script("serving", "--base-url", url, "--model", "any", "--num-warmups", "0", *SHORT, status=status)
    figures = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if ": " in line)
    assert figures["Successful requests:"] == str(num_good)
    assert figures["Failed requests:"] == str(6 - num_good)
    assert figures["Total generated tokens:"] == str(2 * num_good)  # no usage: events are counted
    (line,) = err.splitlines()
    assert "503: too many requests" in line


# The twin


def test_a_profile_and_runs_for_the_twin(tmp_path):
    rows = [{"timestamp": 50 * number, "input_length": 30, "output_length": 4, "hash_ids": []} for number in range(21)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = ("--max-num-seqs", 4, "--max-tokens-per-step", 128, "--quick")
    runs = ("--rates", "40", "--seconds", "0.25", "--repeats", "2", "--policies", "sarathi:token_budget=64")
    out, err = script("twin", "--trace", trace, *runs, *size, "--out", tmp_path / "out")
    assert not err
    name = "gllm-demo_sarathi-token-budget-64_40_"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.json", f"{name}1", f"{name}2"}
    report = json.loads((tmp_path / "out" / f"{name}2" / "report.json").read_text())
    assert report["num_requests"] == 10, "a quarter of a second at twice the trace's 20 a second"
    assert report["config"]["limits"]["max_num_seqs"] == 4
    assert {path.name for path in (tmp_path / "out" / f"{name}1").iterdir()} == {
        "report.json",
        "record.npz",
        "iterations.jsonl.gz",
        "trace.jsonl.gz",
    }
    assert "profile.json: " in out
    _, err = script("twin", "--trace", trace, "--no-profile", "--rates", "0", status=2)
    assert "--rates" in err
