"""`fidelity --decisions`: from a recorded run's times the simulator's shell decides as the engine's loop did."""

import gzip
import json
import re
from itertools import pairwise
from random import Random

import pytest
from core.driving import ORDERED_SPECS, POLICY_SPECS
from core.traffic import draw_limits
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.recorded_runs import Coming, Script, draw_script, record, rewrite_log, small_limits
from sim.test_driver import Hold

from gllm.core import Limits, Request
from gllm.policy import POLICIES
from gllm.report.decision_log import LOG_NAME, read_log
from gllm.sim.cli import main

SHAPES = [(1, 0), (2, 0), (4, 0), (1, 1), (2, 2), (4, 1)]  # stages, micro-batches planned ahead


def fidelity(capsys, run, *words):
    capsys.readouterr()
    status = main(["fidelity", str(run), "--decisions", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def digests(out):
    return re.findall(r"SHA-256 (\w+)", out)


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A run in which everything happens, and what happened."""
    folder = tmp_path_factory.mktemp("busy")
    limits = small_limits(2, 1)
    script = draw_script(5, limits, 150, fail=0.05, echo=0.2)
    return folder, record(folder, "throttle:max_prefill=64,min_prefill=8", limits, script, keep_snapshots=True)


@pytest.fixture
def copy(busy, tmp_path):
    """A copy of that run, to be spoilt."""
    for path in busy[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("spec", POLICY_SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_simulator_decides_as_the_loop_did(capsys, tmp_path, spec, shape):
    limits = small_limits(*shape, num_blocks=30 if sum(shape) % 2 else 60)
    script = draw_script(len(spec) + sum(shape), limits, 30, fail=0.02, echo=0.1)
    record(tmp_path, spec, limits, script)
    status, out, err = fidelity(capsys, tmp_path)
    assert (status, err) == (0, ""), out
    assert out.endswith("equal\n")
    assert len(set(digests(out))) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spec=st.sampled_from(ORDERED_SPECS), seed=st.integers(0, 10**6))
def test_whatever_the_order_and_the_limits(tmp_path_factory, spec, seed):
    folder = tmp_path_factory.mktemp("run")
    limits = draw_limits(Random(seed))
    record(folder, spec, limits, draw_script(seed, limits, 20, fail=0.05, echo=0.1), seed=seed)
    assert main(["fidelity", str(folder), "--decisions"]) == 0


def test_everything_happens_in_the_run_that_the_next_tests_spoil(capsys, busy):
    folder, loop = busy
    assert all(loop.saw.values()), loop.saw
    status, out, _ = fidelity(capsys, folder)
    assert status == 0
    assert out.startswith(f"{folder}: throttle:max_prefill=64,min_prefill=8, {len(loop.shell.log):,} turns, ")
    assert digests(out) == [json.loads((folder / "report.json").read_text())["decision_sha256"]] * 2


def test_the_simulated_log_is_the_recorded_one_byte_for_byte(capsys, busy, tmp_path):
    folder, _ = busy
    assert fidelity(capsys, folder, "--out", tmp_path / "new")[0] == 0
    logs = [gzip.decompress((path / LOG_NAME).read_bytes()) for path in (folder, tmp_path / "new")]
    assert logs[0] == logs[1]
    assert main(["diff", str(folder), str(tmp_path / "new")]) == 0


def test_a_policy_that_holds_work_is_woken_when_it_was(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "hold", Hold)
    limits = small_limits(2, num_blocks=200)
    script = draw_script(1, limits, 60, gap=700)
    record(tmp_path, "hold:hold_ns=300", limits, script)
    turns = list(read_log(tmp_path))
    held = [number for number, turn in enumerate(turns) if "until" in turn]
    empty = [turn for turn in turns if not (turn["done"] or turn["arrived"] or turn["aborted"])]
    assert len(held) > len(empty) > 5, "some wake-ups must come, and others be void"
    assert fidelity(capsys, tmp_path)[0] == 0

    def too_early(turns):
        number = turns.index(empty[0])
        turns[number]["t"] = turns[number - 1]["until"] - 1

    rewrite_log(tmp_path, too_early)
    assert fidelity(capsys, tmp_path)[0] == 1


def test_requests_need_not_be_told_in_the_order_of_their_arrival(capsys, tmp_path):
    script = Script([Coming(Request(id=n, num_prompt_tokens=9, arrival_ns=50 - n), 4, ()) for n in range(5)])
    record(tmp_path, "prefill_first:order=fcfs", small_limits(), script)
    assert fidelity(capsys, tmp_path)[0] == 0


def test_a_log_that_ends_early_is_compared_up_to_there(capsys, tmp_path):
    limits = small_limits(4)
    record(tmp_path, "sarathi", limits, draw_script(3, limits, 60), num_turns=100)
    status, out, err = fidelity(capsys, tmp_path)
    assert status == 0
    assert "100 turns" in out
    assert re.fullmatch(r"gllm: note: the log ends with requests unfinished: \d+; .*\n", err)


def test_a_loop_that_breaks_a_rule_is_found_out(capsys, tmp_path):
    limits = small_limits(1)
    script = draw_script(5, limits, 60, aborts=0)
    script.hasty = True
    record(tmp_path, "sarathi", limits, script)
    status, out, _ = fidelity(capsys, tmp_path)
    assert status == 1
    assert "differs in its time, its results, its arrivals" in out


def one_more(values, index):
    values[index] += 1


CHANGES = {
    "free blocks": (lambda plan: one_more(plan, "free"), "*free"),
    "a chunk's length": (lambda plan: one_more(plan["prefill"][0], 2), "*prefill"),
    "who joined": (lambda plan: plan["joined"].append(3), "*joined"),
    "number": (lambda plan: one_more(plan, "plan"), "*plan"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_decision_that_was_changed(capsys, copy, name):
    change, star = CHANGES[name]
    spoilt = []

    def spoil(turns):
        plans = [plan for turn in turns for plan in turn["plans"]]
        number = next(n for n, plan in enumerate(plans) if n > 100 and plan["prefill"])
        change(plans[number])
        spoilt.append(number)

    rewrite_log(copy, spoil)
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert f"the runs part at decision {spoilt[0]:,}, in turn " in out
    assert "which differs in its plans\n" in out
    assert star in out
    assert len(set(digests(out))) == 2
    assert "equal\n" not in out.splitlines()[-1]


def test_a_decision_that_was_put_off(capsys, copy):
    def spoil(turns):
        for turn, later in pairwise(turns[50:]):
            if turn["plans"] and later["done"] and later["done"][0][0] != turn["plans"][-1]["plan"]:
                later["plans"].insert(0, turn["plans"].pop())
                return

    rewrite_log(copy, spoil)
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert "recorded: no such decision in this turn" in out


def test_a_log_cut_off_at_the_end(capsys, copy):
    rewrite_log(copy, lambda turns: turns[:-1])
    status, out, _ = fidelity(capsys, copy)
    assert status == 0, "what is there is equal"
    assert "it is of another run" not in out, "no decision is in the last turn"


@pytest.mark.parametrize(
    ("field", "called"), [("events", "events"), ("wait", "why it waits"), ("saw", "its plans"), ("done", "its results")]
)
def test_whatever_else_of_a_turn_was_changed(capsys, copy, field, called):
    def spoil(turns):
        turn = next(turn for turn in turns[50:] if turn["plans"] and turn["done"] and not turn["done"][0][1])
        if field == "saw":
            turn["plans"][0]["saw"]["ready"] += 1
        elif field == "done":
            plan = turn["done"][0]
            alive = {entry[1] for later in turns[turns.index(turn) + 1 :] for entry in later["events"]}
            plan[1].append([max(alive & {number for other in turns[:50] for number in other["arrived"]}), "stop"])
        else:
            turn[field] = "no work" if field == "wait" else []
            turn["events"].extend([["Preempted", 0]] if field == "events" else [])

    rewrite_log(copy, spoil)
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert re.search(rf"all decisions so far are equal, \d+; turn \d+ differs in .*{called}", out)
    assert ("*saw ready" if field == "saw" else f"*{field}") in out


def test_an_arrival_that_was_moved(capsys, copy):
    def spoil(turns):
        number = next(n for n, turn in enumerate(turns) if n > 50 and turn["arrived"] and turn["plans"])
        turns[number - 1]["arrived"] += turns[number]["arrived"]
        turns[number]["arrived"] = []

    rewrite_log(copy, spoil)
    assert fidelity(capsys, copy)[0] == 1


def test_another_policy(capsys, copy):
    report = json.loads((copy / "report.json").read_text())
    report["config"]["policy"] = "sarathi:token_budget=64"
    (copy / "report.json").write_text(json.dumps(report))
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert "the runs part at decision " in out
    assert "(of its first " in out, "what follows is of no concern"


def test_a_policy_that_fails_in_the_simulator(capsys, copy, monkeypatch):
    from gllm.core import PlanError

    decide = POLICIES["throttle"].decide

    def failing(self, view):
        if view.num_plans == 40:
            raise PlanError("of no avail")
        return decide(self, view)

    monkeypatch.setattr(POLICIES["throttle"], "decide", failing)
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert "the simulated engine failed: of no avail" in out
    assert "simulated: the log has ended" in out


def test_a_report_of_another_run(capsys, copy):
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps({**report, "decision_sha256": "f00"}))
    status, out, _ = fidelity(capsys, copy)
    assert status == 1
    assert "the report's decisions have SHA-256 f00: it is of another run" in out


def no_time(turns):
    turns[9]["t"] = turns[8]["t"]


def two_results(turns):
    turn = next(turn for turn in turns if turn["done"])
    turn["done"].append([1, []])


def wrong_result(turns):
    next(turn for turn in turns if turn["done"])["done"][0][0] = 7


def early_result(turns):
    turns[0]["done"] = [[0, []]]


def arrives_twice(turns):
    next(turn for turn in turns[1:] if turn["arrived"])["arrived"].insert(0, 0)


def no_number(turns):
    turns[5]["aborted"] = ["x"]


def no_event(turns):
    turns[5]["events"] = [[]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (no_time, "turn 10: is at .* each turn has a time of its own"),
        (two_results, "turn .*: has 2 results; an engine's loop hands in one a turn"),
        (wrong_result, "turn .*: has the result of plan 7; plan 0 is the next"),
        (early_result, "turn 1: has the result of plan 0 before its decision"),
        (arrives_twice, "turn .*: request 0 arrives; "),
        (no_number, "turn 6: names .* as requests"),
        (no_event, "turn 6: "),
    ],
)
def test_a_log_that_cannot_be_is_one_line(capsys, copy, change, complaint):
    rewrite_log(copy, change)
    status, out, err = fidelity(capsys, copy)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gllm: error: .*{re.escape(LOG_NAME)}, {complaint}.*\n", err)


def lines(folder, change):
    path = folder / "trace.jsonl.gz"
    text = change(gzip.decompress(path.read_bytes()).decode().splitlines())
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in text).encode()))


def report(folder, **changes):
    path = folder / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HEADER = "trace.jsonl.gz.*: does not begin with the header of a gllm trace"
LIMITS = {"num_blocks": 4, "block_size": 4}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda run: (run / "report.json").unlink(), "report.json: no such file"),
        (lambda run: (run / "report.json").write_text("{"), "report.json: not a run's report"),
        (lambda run: (run / "report.json").write_text("[]"), "report.json: not a run's report"),
        (lambda run: report(run, config={}), "report.json: policy is missing"),
        (lambda run: report(run, config={"policy": "nope", "limits": LIMITS}), "report.json: .*unknown policy 'nope'"),
        (lambda run: report(run, config={"policy": "orca", "limits": {"nope": 1}}), "report.json: .*nope"),
        (lambda run: report(run, config={"policy": "orca", "limits": {"num_blocks": 0}}), "num_blocks is 0"),
        (
            lambda run: report(run, config={"policy": "orca", "limits": {**LIMITS, "block_size": 16}}),
            "row .* 16 tokens",
        ),
        (lambda run: (run / LOG_NAME).unlink(), "no such log"),
        (lambda run: (run / LOG_NAME).write_bytes(b"x"), "damaged after line 0"),
        (lambda run: (run / "trace.jsonl.gz").unlink(), "trace.jsonl.gz: no such file; only the runtime's replay"),
        (lambda run: (run / "trace.jsonl.gz").write_bytes(b""), HEADER),
        (lambda run: (run / "trace.jsonl.gz").write_bytes(b"{}\n"), HEADER),
        (lambda run: (run / "trace.jsonl.gz").write_bytes(b"x\n"), HEADER),
        (lambda run: lines(run, lambda rows: rows[:-1]), "request 149 arrives; trace.jsonl.gz has 149"),
        (lambda run: lines(run, lambda rows: [*rows, rows[-1]]), "trace.jsonl.gz has 151 requests, .* only 150"),
        (
            lambda run: lines(run, lambda rows: [*rows[:-1], '{"num_prompt_tokens":3,"num_output_tokens":0}']),
            "trace.jsonl.gz, row 151: has no arrival_ns",
        ),
        (
            lambda run: lines(
                run, lambda rows: [*rows[:-1], '{"arrival_ns":1,"num_prompt_tokens":0,"num_output_tokens":0}']
            ),
            "trace.jsonl.gz, row 151: request 149: the prompt is empty",
        ),
    ],
)
def test_a_bad_folder_is_one_line(capsys, copy, spoil, complaint):
    spoil(copy)
    status, out, err = fidelity(capsys, copy)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gllm: error: .*{complaint}.*\n", err)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nope", "--decisions"], "nope: no such folder"),
        ([".", "--decisions"], "report.json: no such file"),
        ([".", "..", "--decisions"], "--decisions takes one RUN"),
        ([".", "--decisions", "--json"], "--decisions .* prints no JSON"),
        ([], "required: RUN"),
    ],
)
def test_bad_words(capsys, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["fidelity", *words])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gllm: error: .*{complaint}.*\n", err)


def test_the_run_itself_is_never_written_into(capsys, copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    status, _, err = fidelity(capsys, copy, "--out", copy)
    assert status == 2
    assert "which this command did not write" in err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_outputs_that_were_made_reusable_are_hit_again(capsys, tmp_path):
    """A conversation: the second prompt holds the first's output, whose hashes only the trace tells."""
    limits = Limits(num_blocks=100, block_size=4)
    first = Coming(Request(id=0, num_prompt_tokens=8, arrival_ns=0, block_hashes=(1, 2)), 9, (1, 2, 3, 4))
    later = Coming(Request(id=1, num_prompt_tokens=18, arrival_ns=10**6, block_hashes=(1, 2, 3, 4)), 5, ())
    assert record(tmp_path, "sarathi", limits, Script([first, later])).saw["cached"]
    assert b'["Scheduled",1,16]' in gzip.decompress((tmp_path / LOG_NAME).read_bytes())
    assert fidelity(capsys, tmp_path)[0] == 0
    lines(tmp_path, lambda rows: [rows[0], rows[1].replace("[[1,4]]", "[[1,2]]"), rows[2]])
    assert fidelity(capsys, tmp_path)[0] == 1
