"""`diff`: where two runs part."""

import gzip
import json

import pytest

from gllm.report.decision_log import LOG_NAME
from gllm.sim.cli import main

FAST = ["--model", "qwen3-0.6b", "--pp", "2", "--limit", "20", "--num-blocks", "4000", "--quiet"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, policy in (("one", "throttle"), ("same", "throttle"), ("other", "sarathi")):
        assert main(["replay", "chat", *FAST, "--policy", policy, "--out", str(folder / name)]) == 0
    return folder


def diff(capsys, one, other):
    capsys.readouterr()
    return main(["diff", str(one), str(other)]), capsys.readouterr().out


def rewritten(runs, name, change):
    """A copy of run "one" whose log's lines went through `change`."""
    lines = gzip.decompress((runs / "one" / LOG_NAME).read_bytes()).decode().splitlines()
    (runs / name).mkdir(exist_ok=True)
    text = "".join(f"{line}\n" for line in change(lines))
    (runs / name / LOG_NAME).write_bytes(gzip.compress(text.encode()))
    return runs / name


def test_equal_runs(capsys, runs):
    status, out = diff(capsys, runs / "one", runs / "same")
    summary = json.loads((runs / "one" / "report.json").read_text())
    assert status == 0
    assert out == f"equal: {summary['num_iterations']:,} decisions, SHA-256 {summary['decision_sha256']}\n"


def test_another_clock_makes_no_difference(capsys, runs):
    def later(lines):
        return (json.dumps({**turn, "t": turn["t"] + 5}) for turn in map(json.loads, lines))

    assert diff(capsys, runs / "one", rewritten(runs, "later", later))[0] == 0


def test_the_first_difference_is_named_with_what_was_seen(capsys, runs):
    status, out = diff(capsys, runs / "one", runs / "other")
    assert status == 1
    assert out.startswith("the runs part at decision ")
    assert "sarathi" in out
    assert "*prefill" in out
    assert "saw waiting tokens" in out


def test_a_run_that_ends_early(capsys, runs):
    short = rewritten(runs, "short", lambda lines: lines[:3])
    status, out = diff(capsys, runs / "one", short)
    assert status == 1
    assert f"{short} ends there" in out
    assert "policy unknown" in out


def test_long_lists_show_what_only_one_has(capsys, runs):
    def joined(extra):
        def change(lines):
            first = json.loads(lines[0])
            first["plans"][0]["joined"] = [*range(100, 130), extra]
            return [json.dumps(first), *lines[1:]]

        return change

    one, other = rewritten(runs, "long", joined(7)), rewritten(runs, "longer", joined(8))
    _, out = diff(capsys, one, other)
    assert "31 entries, 1 only here: 7" in " ".join(out.split())
