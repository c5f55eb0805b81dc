"""`simulate` and `SimConfig`: what a run is made of, and what its record says."""

import gc
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from gllm.core import StallError, Wait
from gllm.parallel import Parallel
from gllm.report.metrics import summarize
from gllm.sim.config import MAX_SIZED_TOKENS, SimConfig
from gllm.sim.constants import RooflineConstants
from gllm.sim.pipeline import ProcessPipeline
from gllm.sim.run import arrivals, simulate
from gllm.trace import TraceOptions

CHAT = TraceOptions(source="chat", limit=40)
SMALL = SimConfig(model="qwen3-0.6b", gpu="l4", parallel=Parallel(pp=2), trace=CHAT)


def changed(config=SMALL, **options):
    return replace(config, **options)


def simulated(config=SMALL, **options):
    return simulate(config, config.trace.load(), **options)


def test_a_run_serves_every_request():
    record = simulated()
    summary = summarize(record, slo_ttft_s=None, slo_tpot_s=None)
    assert summary["num_requests"] == summary["num_finished"] == 40
    assert summary["mode"] == "simulated"
    assert summary["prefix_hit_rate"] > 0.3
    assert summary["wall_s"] > 0
    assert summary["decision_sha256"] is None
    trace = CHAT.load()
    assert record.requests["num_output_tokens"].tolist() == [row.num_output_tokens for row in trace.requests]


def test_the_same_run_twice_is_the_same():
    first, second = simulated(digest=True), simulated(digest=True, pipeline=ProcessPipeline)
    assert first.decision_sha256 == second.decision_sha256
    assert (first.requests == second.requests).all()


def test_the_log_has_the_digest_of_the_run(tmp_path):
    assert simulated(log_path=tmp_path / "log").decision_sha256 == simulated(digest=True).decision_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_without_prefix_caching_nothing_hits():
    record = simulated(changed(prefix_caching=False))
    assert not record.requests["num_cached_tokens"].any()


def test_requests_are_made_when_they_are_due():
    trace = CHAT.load()
    stream = arrivals(SMALL, trace)
    assert iter(stream) is stream
    first = next(stream)
    assert (first.request.id, first.request.arrival_ns) == (0, 0)
    assert first.request.block_hashes == trace.requests[0].block_hashes(16)
    assert [arrival.request.id for arrival in stream] == list(range(1, 40))


def test_what_the_client_said_reaches_the_engine():
    trace = TraceOptions(source="mixed-priority").load()
    for row, arrival in zip(trace.requests, arrivals(SMALL, trace), strict=True):
        request = arrival.request
        assert (request.priority, request.deadline_ns) == (row.priority, row.deadline_ns)
        assert request.max_tokens == row.max_tokens
        assert arrival.num_output_tokens == row.num_output_tokens


def test_the_whole_configuration_is_plain_json():
    config = changed(constants=RooflineConstants(host_ns=5), slo_ttft_s=1.0, policy="throttle:ut=false,order=edf")
    found = simulated(config).config
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert (found["model"], found["gpu"], found["gpus"]) == ("qwen3-0.6b", "l4", "2 x l4")
    assert found["policy"] == "throttle:ut=false,order=edf"
    assert found["policy_options"]["order"] == "edf"
    assert found["policy_options"]["max_prefill"] == 2048
    assert found["cost_constants"]["host_ns"] == 5
    assert found["limits"]["num_blocks"] == config.resolve().limits.num_blocks
    trace = found["trace"]
    assert (trace["name"], trace["limit"], trace["num_requests"], trace["format"]) == ("chat", 40, 40, "gllm")


def test_host_time_delays_the_first_token():
    # Nothing is planned ahead: then no host time hides behind a step of the GPUs.
    slow = changed(constants=RooflineConstants(host_ns=RooflineConstants().host_ns + 50_000_000), max_in_flight=2)
    fast = simulated(trace_one := changed(trace=TraceOptions(source="chat", limit=1), max_in_flight=2))
    late = simulated(changed(slow, trace=trace_one.trace))
    gain = late.requests["first_token_ns"][0] - fast.requests["first_token_ns"][0]
    assert gain % 50_000_000 == 0
    assert gain > 0


def test_defaults_come_from_the_model_and_the_hardware():
    limits = SMALL.resolve().limits
    assert limits.max_model_len == 40_960
    assert (limits.depth, limits.max_in_flight) == (2, 3)
    assert limits.num_blocks > changed(gpu_memory_utilization=0.5).resolve().limits.num_blocks > 1000
    assert changed(num_blocks=77, max_in_flight=3).resolve().limits.num_blocks == 77


def test_buffers_are_sized_for_slices_of_endless_batches():
    # Orca may batch a prompt as long as the model allows; memory is set aside for a slice of it.
    orca, capped = changed(policy="orca"), changed(policy="orca", max_model_len=MAX_SIZED_TOKENS)
    assert orca.resolve().limits.num_blocks == capped.resolve().limits.num_blocks


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "llama-3.1-70b"}, "needs .* GiB on each GPU"),
        ({"model": "nope"}, "known names"),
        ({"gpu": "nope"}, "choose one of"),
        ({"policy": "nope"}, "known: throttle"),
        ({"block_size": 0}, "block_size"),
        ({"max_in_flight": 1}, "max_in_flight is 1"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        changed(**options).resolve()


def test_a_policy_that_stalls_is_named(monkeypatch):
    monkeypatch.setattr("gllm.policy.throttle.Throttle.decide", lambda *_: Wait())
    with pytest.raises(StallError, match="policy throttle:"):
        simulated()


def test_the_collector_is_as_it_was():
    before = gc.get_threshold()
    simulated()
    assert gc.get_threshold() == before
    assert not gc.get_freeze_count()


def test_progress_is_told_how_many_of_how_many():
    seen = []

    @contextmanager
    def progress(total, count):
        seen.extend((total, count()))
        yield
        seen.append(count())

    simulated(progress=progress)
    assert seen == [40, 0, 40]
