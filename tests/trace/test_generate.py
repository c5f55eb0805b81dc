"""The shipped samples and their generator."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import mean, pstdev

import pytest
from gllm_traces import generate

from gllm.trace import TraceError, list_samples, load_trace

NAMES = ["chat", "code", "mixed-priority"]


def hit_share(requests, block_size=16):
    seen: set[int] = set()
    num_hits = num_blocks = 0
    for request in requests:
        hashes = request.block_hashes(block_size)
        num_blocks += len(hashes)
        num_hits += sum(number in seen for number in hashes)
        seen.update(hashes)
    return num_hits / num_blocks


def test_samples_are_listed():
    assert [sample.name for sample in list_samples()] == NAMES
    assert [sample.num_requests for sample in list_samples()] == [1000, 800, 400]
    assert all(sample.description for sample in list_samples())


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_rewrites_the_samples_byte_for_byte(name):
    committed = (generate.SAMPLES / f"{name}.jsonl").read_bytes()
    assert generate.text(name, generate.WORKLOADS[name]).encode() == committed
    assert len(committed) < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_samples_load_by_name(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()  # a folder of that name does not hide the sample
    monkeypatch.chdir(tmp_path)
    trace = load_trace(name)
    assert (trace.name, trace.format, trace.notes) == (name, "gllm", ())
    assert list(trace.requests) == generate.generate(generate.WORKLOADS[name])


def test_a_file_goes_before_a_sample_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "chat").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,1,1\n")
    monkeypatch.chdir(tmp_path)
    assert load_trace("chat").format == "vidur"


def test_chat_hits_prefixes_and_grows():
    requests = load_trace("chat").requests
    assert 600 < requests[-1].arrival_ns / 1e9 < 720
    assert hit_share(requests) == pytest.approx(0.79, abs=0.01)
    assert len({request.hash_ids[0] for request in requests}) == 8  # the system prompts


def test_code_is_bursty_with_long_prompts_and_short_outputs():
    requests = load_trace("code").requests
    gaps = [b.arrival_ns - a.arrival_ns for a, b in pairwise(requests)]
    assert pstdev(gaps) / mean(gaps) > 4
    assert mean(r.num_prompt_tokens for r in requests) > 100 * mean(r.num_output_tokens for r in requests)


def test_mixed_priority_has_classes_with_deadlines():
    requests = load_trace("mixed-priority").requests
    waits = {(r.priority, None if r.deadline_ns is None else (r.deadline_ns - r.arrival_ns) // 10**6) for r in requests}
    assert waits == {(0, 500), (1, 3000), (2, None)}


def test_ids_are_chained_and_blocks_full():
    """One id has one prefix, and every full block of the prompt has an id."""
    before: dict[int, tuple[int, ...]] = {}
    for request in load_trace("chat").requests:
        assert len(request.hash_ids) == request.num_prompt_tokens // generate.BLOCK_SIZE
        for place, number in enumerate(request.hash_ids):
            assert before.setdefault(number, request.hash_ids[:place][-1:]) == request.hash_ids[:place][-1:]


def test_same_seed_same_trace_other_seed_other_trace():
    workload = replace(generate.WORKLOADS["chat"], num_requests=50)
    assert generate.generate(workload) == generate.generate(replace(workload))
    assert generate.generate(workload) != generate.generate(replace(workload, seed=99))
    assert len(generate.generate(workload)) == 50


def test_rate_is_what_was_asked_for():
    workload = replace(generate.WORKLOADS["code"], num_requests=4000, rate_per_s=20.0, cv=1.0)
    requests = generate.generate(workload)
    assert len(requests) / (requests[-1].arrival_ns / 1e9) == pytest.approx(20, rel=0.15)


def test_command_line_writes_a_file(tmp_path, capsys):
    path = tmp_path / "my.jsonl"
    options = ["code", "--requests", "20", "--rate", "4", "--cv", "1", "--seed", "7"]
    assert generate.main([*options, "--out", str(path)]) == 0
    assert len(load_trace(path).requests) == 20
    assert generate.main(options) == 0
    assert capsys.readouterr().out == path.read_text()


def test_command_line_rewrites_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SAMPLES", tmp_path)
    assert generate.main(["--samples"]) == 0
    assert sorted(path.stem for path in tmp_path.iterdir()) == NAMES


def test_command_line_refuses_in_one_line(tmp_path, capsys):
    assert generate.main(["chat", "--requests", "3", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for wrong in (["--requests", "0"], ["--rate", "0"], ["--rate", "nan"], ["--cv", "x"], ["song"]):
        with pytest.raises(SystemExit):
            generate.main(wrong)


def test_without_the_package_of_samples(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("gllm.trace.samples.resources.files", absent)
    assert list_samples() == ()
    with pytest.raises(TraceError, match="samples: none installed"):
        load_trace(tmp_path / "chat")
