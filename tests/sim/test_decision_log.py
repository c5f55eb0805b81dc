"""The decision log: what it holds, what its digest covers, and how broken ones are met."""

import gzip
import hashlib
import json

import pytest
from sim.costs import FixedCost
from sim.played import POLICY_SPECS, Played, arrival, tied_traffic

from gllm.core import StepResult, Stopped, Turn, Wait, WaitReason
from gllm.report.decision_log import LOG_NAME, DecisionLog, canonical, read_decisions, read_log

KEYS = ["plan", "prefill", "decode", "previous", "joined", "left", "grown", "preempted", "free"]


def logged(path, arrivals, **options):
    with DecisionLog(path) as log:
        record = Played(arrivals, log=log, **options).run()
    return log.sha256, record


def at_once(count=60):
    return [arrival(n, prompt=5 + 7 * n % 60, output=1 + 5 * n % 40) for n in range(count)]


@pytest.mark.parametrize("policy", POLICY_SPECS)
def test_equal_decisions_have_equal_digests_whatever_the_clock_says(tmp_path, policy):
    options = {"policy": policy, "num_blocks": 60, "block_size": 4, "max_num_seqs": 16}
    slow = FixedCost(num_stages=2, batch_ns=999, token_ns=13, host_ns=7)
    first, one = logged(tmp_path / "a", at_once(), cost=FixedCost(num_stages=2, batch_ns=10), **options)
    second, other = logged(tmp_path / "b", at_once(), cost=slow, **options)
    assert one.done_ns[-1] != other.done_ns[-1]
    assert first == second
    assert list(map(canonical, read_decisions(tmp_path / "a"))) == list(map(canonical, read_decisions(tmp_path / "b")))


def test_another_decision_has_another_digest(tmp_path):
    digests = {logged(tmp_path / "log", at_once(), policy=policy)[0] for policy in POLICY_SPECS}
    assert len(digests) == len(POLICY_SPECS)


def test_equal_runs_make_equal_bytes(tmp_path):
    for name in "ab":
        logged(tmp_path / name, tied_traffic(100), policy="throttle")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_digest_is_that_of_the_decision_lines(tmp_path):
    digest, _ = logged(tmp_path / "log", tied_traffic(200), policy="throttle", num_blocks=40, block_size=4)
    lines = [canonical(decision) for decision in read_decisions(tmp_path / "log")]
    assert digest == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    with gzip.open(tmp_path / "log", "rt") as file:
        assert all(line.rstrip("\n") == json.dumps(json.loads(line), separators=(",", ":")) for line in file)


def test_a_digest_without_a_file_is_the_same(tmp_path):
    digest, _ = logged(tmp_path / "log", at_once())
    log = DecisionLog()
    with log:
        Played(at_once(), log=log).run()
    assert log.sha256 == digest


def test_the_log_tells_what_happened(tmp_path):
    _, record = logged(tmp_path / "log", tied_traffic(200), policy="sarathi", num_blocks=30, block_size=4)
    turns = list(read_log(tmp_path / "log"))
    decisions = list(read_decisions(tmp_path / "log"))
    assert [list(decision) for decision in decisions] == [["t", *KEYS, "saw"]] * len(decisions)
    assert [decision["plan"] for decision in decisions] == list(range(record.batches.size))
    assert [decision["t"] for decision in decisions] == record.batches["dispatched_ns"].tolist()
    assert [decision["free"] for decision in decisions] == record.batches["num_free_blocks"].tolist()
    assert sum(len(decision["preempted"]) for decision in decisions) == record.requests["num_preemptions"].sum() > 0
    assert sorted(number for turn in turns for number in turn["arrived"]) == list(range(200))
    assert [plan for turn in turns for plan, _ in turn["done"]] == list(range(record.batches.size))
    ended = [event for turn in turns for event in turn["events"] if event[0] in {"Finished", "Rejected"}]
    assert len(ended) == 200
    assert turns[-1]["wait"] == "no work"


def test_everything_a_turn_may_hold(tmp_path):
    results = (StepResult(3, (Stopped(7), Stopped(8, "error"))), StepResult(4))
    with DecisionLog(tmp_path / "log") as log:
        log.write(5, results, (), (1, 2), Turn([], [], Wait(WaitReason.HELD, 99)))
    assert list(read_log(tmp_path / "log")) == [
        {
            "t": 5,
            "done": [[3, [[7, "stop"], [8, "error"]]], [4, []]],
            "arrived": [],
            "aborted": [1, 2],
            "plans": [],
            "events": [],
            "wait": "held",
            "until": 99,
        }
    ]


def test_after_an_exception_nothing_is_left_and_an_older_log_stays(tmp_path):
    (tmp_path / "log").write_text("older")
    log = DecisionLog(tmp_path / "log")
    log.write(0, (), (), (), Turn([], [], Wait()))
    with pytest.raises(ZeroDivisionError), log:
        log.write(1 // 0, (), (), (), Turn([], [], Wait()))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert (tmp_path / "log").read_text() == "older"


def test_a_folder_stands_for_its_log(tmp_path):
    logged(tmp_path / LOG_NAME, at_once(3))
    assert list(read_log(tmp_path)) == list(read_log(tmp_path / LOG_NAME))


def whole(path):
    logged(path, at_once())
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("missing", None, "no such log"),
        ("cut", lambda data: data[: len(data) // 2], "damaged after line"),
        ("flipped", lambda data: data[:200] + bytes([data[200] ^ 255]) + data[201:], "damaged after line|not a turn"),
        ("no gzip", lambda _: b'{"t":0}\n', "damaged after line 0"),
        ("no JSON", lambda _: gzip.compress(b"hello\n"), "line 1: not a turn"),
        ("no turn", lambda _: gzip.compress(b'{"t":0}\n'), "line 1: not a turn .*keys are missing"),
        ("a list", lambda _: gzip.compress(b"[]\n"), "line 1: not a turn"),
        ("no UTF-8", lambda _: gzip.compress(b"\xff\n"), "damaged after line 0"),
    ],
)
def test_a_broken_log_is_one_clear_line(tmp_path, name, damage, complaint):
    path = tmp_path / name
    if damage:
        path.write_bytes(damage(whole(path)))
    with pytest.raises(ValueError, match=complaint) as caught:
        list(read_log(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
