"""The twin's second promise: real workers and the simulator decide alike, byte for byte."""

import json
from pathlib import Path

import pytest
from twin.bodies import both, fidelity, small_trace, summary_of, with_aborts, words, written

from gllm.runtime.cli import main as runtime
from gllm.sim.cli import main as sim

POLICIES = ("throttle", "sarathi:token_budget=24", "prefill_first", "orca")
TIGHT = {"throttle": 40, "sarathi:token_budget=24": 36, "prefill_first": 36, "orca": 60}
"""Blocks that make the policy preempt; Orca reserves and never does, but has to fit its longest request."""


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_queued_at_the_start_both_bodies_decide_alike(policy, pp, tmp_path, capsys):
    """No times are injected: with all requests there from the start, decisions do not depend on time."""
    trace = written(small_trace(seed=pp), tmp_path)
    argv = words(trace, policy, pp, num_blocks=TIGHT[policy])
    real, simulated = both(argv, tmp_path / "run", capsys)
    assert real["decision_sha256"] == simulated["decision_sha256"]
    assert real["mode"] == "measured"
    for measure in ("num_requests", "num_finished", "num_iterations", "num_preemptions", "prefix_hit_rate"):
        assert real[measure] == simulated[measure]
    assert real["num_finished"] == 28
    assert real["prefix_hit_rate"] > 0
    assert real["num_preemptions"] > 0 or policy == "orca"
    assert fidelity(tmp_path / "run") == 0


@pytest.mark.parametrize("policy", ["throttle", "sarathi:token_budget=24,order=lpm"])
def test_planned_ahead_both_bodies_decide_alike(policy, tmp_path, capsys):
    """Steps are planned before the token before them is known, in both bodies."""
    argv = words(written(small_trace(seed=8), tmp_path), policy, 2, num_blocks=44, max_in_flight=3)
    real, simulated = both(argv, tmp_path / "run", capsys)
    assert real["num_discarded_tokens"] > 0
    assert real["decision_sha256"] == simulated["decision_sha256"]
    assert fidelity(tmp_path / "run") == 0


def test_traffic_in_real_time_is_reproduced_from_its_event_times(tmp_path, capsys):
    argv = words(written(small_trace(seed=5), tmp_path), "throttle:order=edf", 2, num_blocks=40, burst=False)
    real = summary_of(runtime, [*argv, "--out", str(tmp_path / "run")], capsys)
    assert real["num_finished"] == 28
    assert fidelity(tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("policy", "pp", "max_in_flight"), [("throttle", 1, 2), ("sarathi:token_budget=24,order=priority", 2, 2)]
)
def test_aborts_are_reproduced_too(policy, pp, max_in_flight, tmp_path, capsys):
    trace = small_trace(seed=11)
    summary = with_aborts(
        trace,
        tmp_path / "run",
        seed=pp,
        num_aborts=9,
        policy=policy,
        pp=pp,
        max_in_flight=max_in_flight,
        num_blocks=40,
    )
    assert summary["num_aborted"] > 0
    assert summary["num_finished"] + summary["num_aborted"] == 28
    assert fidelity(tmp_path / "run") == 0
    assert "equal" in capsys.readouterr().out


@pytest.mark.parametrize("pp", [1, 2])
def test_what_gpus_decided_the_simulator_decides_today(pp, tmp_path, capsys):
    """tests/runtime/test_gpu.py on two H200s, kept in benchmarks/results."""
    kept = json.loads(Path(__file__).parents[2].joinpath("benchmarks/results/gpu_checks.json").read_text("utf-8"))
    (found,) = [check for check in kept["checks"] if check["what"] == f"decisions pp={pp}"]
    argv = words(written(small_trace(seed=pp), tmp_path), "throttle", pp, num_blocks=40)
    assert summary_of(sim, argv, capsys)["decision_sha256"] == found["real"]
