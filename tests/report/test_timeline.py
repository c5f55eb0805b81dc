import io
import json
from collections import Counter
from itertools import pairwise

import pytest
from report.made import at_random, by_hand, record

from gllm.report.timeline import PIPELINE, REQUESTS, write_timeline, write_twin_timeline


def events(made, **limits):
    out = io.StringIO()
    counts = write_timeline(out, made, **limits)
    trace = json.loads(out.getvalue())
    assert trace["otherData"] == counts
    return trace["traceEvents"], counts


def slices(found, process):
    return [event for event in found if event["ph"] == "X" and event["pid"] == process]


def test_every_batch_is_a_slice_on_every_stage():
    found, counts = events(by_hand())
    pipeline = slices(found, PIPELINE)
    assert len(pipeline) == 5 * 2
    assert counts["num_batches_left_out"] == 0
    first = next(event for event in pipeline if event["tid"] == 1 and event["name"].startswith("batch 1:"))
    assert first["name"] == "batch 1: 6p+1d"
    assert (first["ts"], first["dur"]) == (3e6, 1e6)
    assert first["args"] == {"prefill_tokens": 6, "decode_tokens": 1}


def test_requests_show_their_phases():
    found, _ = events(by_hand())
    spans = {event["name"]: (event["ts"] / 1e6, event["dur"] / 1e6) for event in slices(found, REQUESTS)}
    assert spans == {
        "prefill r0": (0, 2),
        "decode r0": (2, 4),
        "queued r1": (1, 1),
        "prefill r1": (2, 2),
        "prefill r3": (8, 2),  # aborted before its first token
    }


def test_counters_follow_the_decisions_and_do_not_repeat_themselves():
    found, _ = events(by_hand())
    tracks = {}
    for event in found:
        if event["ph"] == "C":
            tracks.setdefault(event["name"], []).append((event["ts"] / 1e6, event["args"]["value"]))
    assert tracks["KV cache in use, %"] == [(0, 20), (2, 40), (4, 20), (8, 10)]
    assert tracks["waiting"] == [(0, 0)]
    assert tracks["running"] == [(0, 1), (2, 2), (4, 1)]


def test_lanes_and_processes_are_named():
    found, _ = events(by_hand())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert names[PIPELINE, 1] == "stage 1"
    used = {(event["pid"], event["tid"]) for event in found if event["ph"] == "X"}
    assert used <= names.keys()


def test_slices_of_a_lane_never_overlap():
    found, _ = events(at_random(1000, 300))
    lanes = {}
    for event in slices(found, REQUESTS):
        lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():
        assert all(before[1] <= after[0] + 1e-3 for before, after in pairwise(sorted(lane)))


@pytest.mark.parametrize("limit", [0, 1, 100, 1000])
def test_the_limit_holds_and_what_is_left_out_is_counted(limit):
    found, counts = events(at_random(1000, 300), max_slices=limit)
    assert Counter(event["ph"] for event in found)["X"] <= limit
    assert counts["num_batches"] + counts["num_batches_left_out"] == 1000
    assert counts["num_requests"] + counts["num_requests_left_out"] == 300


def test_an_empty_run_is_a_valid_timeline():
    found, counts = events(record())
    assert not slices(found, PIPELINE)
    assert set(counts.values()) == {0}


def test_twins_lie_above_each_other():
    out = io.StringIO()
    counts = write_twin_timeline(out, {"measured": by_hand(), "simulated": by_hand()}, max_slices=12)
    trace = json.loads(out.getvalue())
    assert trace["otherData"] == counts
    assert counts == dict.fromkeys(("num_batches_measured", "num_batches_simulated"), 3) | dict.fromkeys(
        ("num_batches_measured_left_out", "num_batches_simulated_left_out"), 2
    )
    found = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert names == {0: "stage 0, measured", 1: "stage 0, simulated", 2: "stage 1, measured", 3: "stage 1, simulated"}
    lanes = {}
    for event in slices(found, PIPELINE):
        lanes.setdefault(event["tid"], []).append((event["name"], event["ts"], event["dur"]))
    assert lanes[0] == lanes[1]
    assert lanes[2] == lanes[3] != lanes[0]
    assert [len(lane) for lane in lanes.values()] == [3] * 4
    assert {event["pid"] for event in found if event["ph"] == "C"} == {PIPELINE + 1, PIPELINE + 2}
