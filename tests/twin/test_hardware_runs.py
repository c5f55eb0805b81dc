"""The twin's third promise: simulated again, runs recorded on GPUs are no further off than results/twin.json says."""

import json

import pytest
from twin.benchmark_scripts import load_script

fidelity = load_script("fidelity")

TOLERANCE = 0.25
"""Percentage points that an error may grow by."""

GROUPS = fidelity.groups()
WRITTEN = json.loads((fidelity.RESULTS / f"{fidelity.NAME}.json").read_text())["groups"]
ANEW = "`python benchmarks/fidelity.py` writes benchmarks/results/twin.json anew"


def grown(name, metrics, written):
    """A line for each metric that is further off than was written, or is in one of the two only."""
    now, before = ({row["label"]: row["error"] for row in rows} for rows in (metrics, written))
    return [
        f"{name}, {label}: error {show(now, label)}, written {show(before, label)}; {ANEW}"
        for label in dict.fromkeys([*before, *now])
        if label not in now or label not in before or not is_as_good(now[label], before[label])
    ]


def is_as_good(now, before):
    """An error is None where one body has something of which the other has nothing."""
    if now is None or before is None:
        return now is None and before is None
    return abs(now) <= abs(before) + TOLERANCE


def show(errors, label):
    error = errors.get(label, "missing")
    return f"{error:+.2f}" if isinstance(error, float) else str(error)


def test_the_runs_are_those_that_were_written():
    runs = {name: [folder.name for folder in folders] for name, folders in GROUPS.items()}
    written = {name: [row["run"] for row in group["decisions"]] for name, group in WRITTEN.items()}
    assert runs == written, ANEW
    assert [group["profile"] for group in WRITTEN.values()] == [fidelity.profile_of(name) for name in WRITTEN], ANEW


@pytest.mark.parametrize("name", GROUPS)
def test_decisions_are_equal_and_no_error_has_grown(name):
    found = fidelity.compared(name, GROUPS[name])
    apart = [f"{each.run}, turn {each.turn}: {each.differs_in}" for each in found.injected if not each.is_equal]
    assert not apart, "\n".join(apart)
    assert len(found.injected) == len(GROUPS[name])
    worse = grown(name, found.to_json()["metrics"], WRITTEN[name]["metrics"])
    assert not worse, "\n".join(worse)


def test_a_grown_error_is_told_by_group_metric_and_both_errors():
    rows = [
        {"label": "TTFT mean", "error": -1.0},
        {"label": "duration", "error": 0.5},
        {"label": "none", "error": None},
        {"label": "gone", "error": 2.0},
    ]
    assert grown("g", rows, rows) == []
    better = [{**row, "error": row["error"] and row["error"] / 4} for row in rows]
    assert grown("g", better, rows) == []
    worse = [
        {"label": "TTFT mean", "error": 1.26},
        {"label": "duration", "error": 0.75},
        {"label": "none", "error": 0.1},
        {"label": "new", "error": 0.0},
    ]
    assert grown("g", worse, rows) == [
        f"g, TTFT mean: error +1.26, written -1.00; {ANEW}",
        f"g, none: error +0.10, written None; {ANEW}",
        f"g, gone: error missing, written +2.00; {ANEW}",
        f"g, new: error +0.00, written missing; {ANEW}",
    ]
