import dataclasses
import json
import math

import numpy as np
import pytest
from report.made import ABORT, REJECTED, STOP, UNFINISHED, at_random, by_hand, record

from gllm.report.metrics import plain, summarize

EXPECTED = {
    "mode": "simulated",
    "decision_sha256": "ab" * 32,
    "num_requests": 4,
    "num_finished": 2,
    "num_rejected": 1,
    "num_aborted": 1,
    "num_failed": 0,
    "num_unfinished": 0,
    "duration_s": 10.0,
    "wall_s": 0.5,
    "num_iterations": 5,
    "requests_per_s": 0.2,
    "output_tokens_per_s": 0.4,
    "total_tokens_per_s": 2.0,
    "ttft_s": {"mean": 2.5, "p50": 2.5, "p90": 2.9, "p99": 2.99},
    "tpot_s": {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0},
    "e2e_s": {"mean": 4.5, "p50": 4.5, "p90": 5.7, "p99": 5.97},
    "queue_s": {"mean": 0.5, "p50": 0.5, "p90": 0.9, "p99": 0.99},
    # gaps of 2 s, 2 s and, alone, 4 s; the discarded step counts for nothing
    "itl_s": {"mean": 8 / 3, "p50": 2.0, "p90": 4.0, "p99": 4.0},
    "goodput": {"slo_ttft_s": None, "slo_tpot_s": None, "requests_per_s": 0.2, "attainment": None},
    # active for 8 s; stage 0 busy for 5 s of them, stage 1 for 4 s
    "bubble_fraction": 0.4375,
    "stages": [
        {"busy_s": 5.5, "bubble_fraction": 0.375, "occupancy": 0.55},
        {"busy_s": 5.0, "bubble_fraction": 0.5, "occupancy": 0.5},
    ],
    "tokens_per_batch": {"mean": 3.8, "std": math.sqrt(6.16)},
    "prefill_tokens_per_batch": {"mean": 3.2, "std": math.sqrt(7.36)},
    "decode_tokens_per_batch": {"mean": 0.6, "std": math.sqrt(0.24)},
    "num_discarded_tokens": 1,
    "num_preemptions": 1,
    "num_cached_tokens": 4,
    "num_peak_blocks": 4,
    "prefix_hit_rate": 0.2,
    "kv_use": {"mean": 0.225, "peak": 0.4},
    "config": {"model": "toy", "policy": {"name": "fixed"}},
}


def summary(made, ttft=None, tpot=None):
    return summarize(made, slo_ttft_s=ttft, slo_tpot_s=tpot)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_measure_by_hand(name):
    found = summary(by_hand())[name]
    assert _flat(found) == pytest.approx(_flat(EXPECTED[name]))


def test_nothing_is_measured_that_is_not_checked():
    assert summary(by_hand()).keys() == EXPECTED.keys()


@pytest.mark.parametrize(
    ("ttft", "tpot", "num_good"),
    [(2.5, None, 1), (3.0, None, 2), (2.0, 2.0, 1), (None, 1.9, 1), (None, 2.0, 2), (1.0, 1.0, 0)],
)
def test_goodput_needs_both_objectives_and_a_lone_token_has_no_tpot(ttft, tpot, num_good):
    goodput = summary(by_hand(), ttft, tpot)["goodput"]
    assert goodput == {
        "slo_ttft_s": ttft,
        "slo_tpot_s": tpot,
        "requests_per_s": pytest.approx(num_good / 10),
        "attainment": num_good / 4,
    }


def test_an_empty_run_has_no_values_but_all_keys():
    found = summary(record(decision_sha256=None))
    assert found.keys() == EXPECTED.keys()
    assert (found["num_requests"], found["duration_s"], found["requests_per_s"]) == (0, 0.0, None)
    assert found["bubble_fraction"] is None
    assert found["kv_use"] == {"mean": None, "peak": None}
    assert found["stages"] == [{"busy_s": 0.0, "bubble_fraction": None, "occupancy": None}] * 2


def test_all_rejected():
    found = summary(record(requests=[(t, -1, -1, t, 5, 0, 0, 0, REJECTED) for t in (0, 1, 2)]), ttft=1.0)
    assert (found["num_rejected"], found["num_finished"], found["requests_per_s"]) == (3, 0, 0.0)
    assert found["ttft_s"]["mean"] is None
    assert found["goodput"]["attainment"] == 0.0


def test_single_token_outputs_have_no_tpot():
    found = summary(record(requests=[(0, 0, 1, 1, 5, 1, 0, 0, STOP)]))
    assert found["ttft_s"]["p99"] == 1.0
    assert found["tpot_s"]["mean"] is None


def test_what_never_ended_is_active_until_the_record_ends():
    batches = [(0, 5, 0, 5, 0, 1, -1, 0), (9, 0, 1, 5, 0, 1, 0, 1)]
    row = (0, 0, 1, -1, 5, 0, 0, 0, UNFINISHED)
    made = record(requests=[row], batches=batches, stages=[[(0, 1)], [(9, 10)]], done=[1, 10], num_stages=1)
    assert summary(made)["stages"][0]["bubble_fraction"] == pytest.approx(0.8)


def test_batches_that_never_ran_or_came_back_are_left_out():
    batches = [(0, 5, 0, 5, 0, 1, -1, 0), (1, 0, 1, 5, 0, 1, 0, 1)]
    row = (0, 0, 1, 2, 5, 1, 0, 0, ABORT)
    made = record(requests=[row], batches=batches, stages=[[(0, 1)], [(-1, -1)]], done=[1, -1], num_stages=1)
    found = summary(made)
    assert found["stages"][0]["busy_s"] == 1.0
    assert found["itl_s"]["mean"] is None


def test_more_discarded_than_continuing_weighs_nothing():
    assert summary(by_hand(discarded=[0, 9, 0, 1, 0]))["itl_s"]["mean"] == pytest.approx(3.0)


def test_inter_token_gaps_equal_the_repeated_multiset():
    made = at_random(2000, 50)
    gaps = (made.done_ns[4:] - made.done_ns[:-4]) / 1e9
    everyone = np.repeat(gaps, made.batches["num_continuing"][4:])
    expected = np.percentile(everyone, [50, 90, 99], method="inverted_cdf")
    found = summary(made)["itl_s"]
    assert [found[name] for name in ("p50", "p90", "p99")] == expected.tolist()
    assert found["mean"] == pytest.approx(everyone.mean())


def test_the_summary_is_strict_json():
    config = {"inf": math.inf, "nan": math.nan, "count": np.int64(3), "path": object, "list": (1, np.float64(2))}
    for made in (by_hand(config=config), record(config=config, wall_s=math.nan)):
        json.dumps(summary(made), allow_nan=False)
    assert plain(config)["count"] == 3
    assert plain(config)["list"] == [1, 2.0]
    assert plain(config)["nan"] is None


def test_the_record_is_not_changed():
    made = by_hand()
    before = {field.name: np.copy(getattr(made, field.name)) for field in dataclasses.fields(made)[5:]}
    summary(made)
    for name, value in before.items():
        assert np.array_equal(getattr(made, name), value)


def _flat(value):
    """Nested values as one mapping that pytest.approx accepts."""
    if isinstance(value, dict):
        return {f"{key}.{inner}": leaf for key, item in value.items() for inner, leaf in _flat(item).items()}
    if isinstance(value, list):
        return _flat(dict(enumerate(value)))
    return {"": value}
