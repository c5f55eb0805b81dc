"""The clock model beside what an H200 took: the committed patterns, those that it is not fitted to above all."""

import json
import re
from functools import cache
from statistics import fmean

import pytest
from twin.benchmark_scripts import BENCHMARKS, load_script

from gllm.gpu_clock import StageClock
from gllm.runtime.profile.clock_fit import errors, power_of

script = load_script("clock")

PATH = BENCHMARKS / "results" / "clock-patterns_qwen3-8b_nvidia-h200.json"
SECONDS = BENCHMARKS / "results" / "clock-patterns_seconds_qwen3-8b_nvidia-h200.json"
SMALL = BENCHMARKS / "results" / "clock-patterns_qwen3-0.6b_nvidia-h200.json"


@cache
def found():
    return script.read(PATH)


def test_patterns_that_the_clock_was_not_fitted_to():
    clock, rows, means = script.judge(found())
    assert means["unseen, with"] < 0.012
    assert means["unseen, without"] > 2.5 * means["unseen, with"]
    warm = [row for row in rows if row[1] == "unseen" or "beside" in row[0]]
    assert fmean(float(row[4]) for row in warm) > 2.4, "percent, if steps took what they take after a rest"
    assert means["fitted, with"] < 0.012
    assert means["fitted, without"] > 0.05
    assert max(abs(float(row[-2])) for row in rows) < 3.1, "percent, of the mean of a pattern"
    (limit,) = clock.limits
    assert 30e6 < limit.tau_ns < 60e6
    assert 0.11 < limit.slowdown < 0.14


def test_another_card_in_seconds_of_steps():
    """A slower limit shows there, in dips: steps are off by 2 % each, patterns by less in their sum."""
    clock, rows, means = script.judge(script.read(SECONDS))
    first, second = clock.limits
    assert 30e6 < first.tau_ns < 60e6
    assert 300e6 < second.tau_ns < 1500e6
    assert 0.12 < first.slowdown < 0.16
    assert 0.015 < second.slowdown < 0.05
    assert means["unseen, with"] < 0.016
    assert means["unseen, without"] > 0.05
    off = {row[0]: float(row[-2]) for row in rows}
    # What took a third longer for 1.8 seconds, at a higher clock, was not what steps draw.
    assert off.pop("8 x 1280 tokens") < -9
    assert max(map(abs, off.values())) < 2.1, "percent, of the mean of a pattern"
    assert max(abs(value) for name, value in off.items() if name.startswith("8 x")) < 1.6


def test_a_small_model_heats_no_gpu():
    """What is fitted to its steps brings them no nearer, so that `profile` would leave it out."""
    _, rows, means = script.judge(script.read(SMALL))
    assert len(rows) == 56
    assert means["fitted, with"] > means["fitted, without"]
    assert means["unseen, without"] < 0.005
    busy = [float(row[3]) for row in rows if "beside" in row[0]]
    assert len(busy) == 6
    assert max(map(abs, busy)) < 0.4, "percent, of steps as an engine under load has them, for seconds, too"


def test_the_simulators_clock_is_the_fitted_one():
    clock, _, _ = script.judge(found())
    for steps in script.series_of(found())[:12]:
        stage, predicted = StageClock(clock), []
        for step in steps:
            rested_ns, power = step.kind.rested_ns, power_of(clock, step.kind)
            took = stage.step(int(step.idle_ns), int(rested_ns), step.kind.stretched_ns, power)
            predicted += [took / step.took_ns - 1.0] if step.counts else []
        assert predicted == pytest.approx(errors(clock, [steps]), abs=0.012)


@pytest.mark.parametrize(("path", "expected"), [(PATH, ("0.8", 3)), (SECONDS, ("1.48", 4))])
def test_a_picture_and_no_gpu(path, expected, tmp_path, capsys, monkeypatch):
    error, num_drawn = expected
    monkeypatch.setattr("sys.argv", ["clock.py", "--read", str(path), "--out", str(tmp_path)])
    assert script.main() == 0
    assert f"unseen, with the clock: mean absolute error {error}" in capsys.readouterr().out
    (picture,) = tmp_path.iterdir()
    drawn = len(re.findall(r'<g id="axes_\d+">', picture.read_text(encoding="utf-8")))
    assert drawn == num_drawn <= len(script.DRAWN) == 4


@pytest.mark.parametrize("drawn", script.DRAWN)
def test_what_is_drawn_is_played(drawn):
    assert any(pattern.name.startswith(drawn) for pattern in script.patterns())


EMPTY = {"model": "m", "gpu": "g", "kinds": {}, "patterns": []}
ODD_KIND = {**EMPTY, "kinds": {"8 tokens": {"num_tokens": 8, "layers_ns": 0}}}


@pytest.mark.parametrize("text", ["", "[]", *map(json.dumps, ({"kinds": {}}, EMPTY, ODD_KIND))])
def test_what_is_no_such_file_is_refused_in_a_line(text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "other.json"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["clock.py", "--read", str(path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "give a file that this script has written" in capsys.readouterr().err
