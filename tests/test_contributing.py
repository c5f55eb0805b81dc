"""The policy in CONTRIBUTING.md, run as it stands there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import deque
from itertools import chain
from pathlib import Path

import pytest

from gllm.core import Engine, Finished, FirstToken, Limits, Request, StepResult
from gllm.policy import ORDERS, POLICIES
from gllm.policy.spec import parse_spec

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
CODE, LINE = re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT)
LIMITS = Limits(num_blocks=256, block_size=16, max_model_len=1024, max_num_seqs=4, depth=2)
LENGTHS = [(40, 30), (600, 2), (17, 1), (64, 25), (5, 40), (900, 3), (33, 8), (16, 16), (1, 1), (300, 120)]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "static.py"
    path.write_text(CODE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("gllm.policy.static", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return POLICIES | eval(f"{{{LINE}}}", {"Static": module.Static})  # noqa: S307


def live(policy, limits, lengths=LENGTHS):
    """Every turn of a run in which all requests are there at the start: (batch that came back, events, plans)."""
    engine = Engine(policy, limits)
    requests = [
        Request(id=number, num_prompt_tokens=prompt, arrival_ns=0, max_tokens=output)
        for number, (prompt, output) in enumerate(lengths)
    ]
    turns = [engine.turn(requests=requests, now=0)]
    road = deque(turns[0].plans)
    while road:
        turns.append(engine.turn([StepResult(road.popleft().id)], now=len(turns)))
        road += turns[-1].plans
        engine.check_invariants()
    assert engine.num_unfinished == 0
    return turns


def test_it_has_twenty_lines_as_promised():
    lines = [line for line in CODE.splitlines() if line.strip()]
    body = [line for line in lines if not line.startswith(("from", '"""'))]
    assert len(body) <= 20


def test_the_checks_accept_it():
    command = [sys.executable, "-m", "ruff"]
    name = ["--stdin-filename", "gllm/policy/static.py", "-"]
    for action in (["check"], ["format", "--check"]):
        done = subprocess.run(  # noqa: S603
            [*command, *action, *name], input=CODE, text=True, cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spec", ["static", "static:token_budget=64", "static:token_budget=4096,order=sjf"])
def test_every_request_is_served_in_full(policies, spec):
    turns = live(parse_spec(spec, policies, ORDERS), LIMITS)
    ended = {event.id: event.num_output_tokens for turn in turns for event in turn.events if type(event) is Finished}
    assert ended == {number: output for number, (_, output) in enumerate(LENGTHS)}


def test_nobody_is_admitted_until_all_of_the_last_batch_are_done(policies):
    running: set[int] = set()
    sizes = []
    for turn in live(parse_spec("static", policies, ORDERS), LIMITS):
        running -= {event.id for event in turn.events if type(event) is Finished}
        admitted = {chunk.sequence.id for plan in turn.plans for chunk in plan.chunks}
        if admitted:
            assert not running, "somebody joined a batch that was running"
            running = set(admitted)
            sizes.append(len(admitted))
    assert sizes == [4, 4, 2]


def test_a_short_answer_waits_for_the_longest_before_it(policies):
    happened = {}
    for now, turn in enumerate(live(parse_spec("static", policies, ORDERS), LIMITS)):
        happened |= {(type(event), event.id): now for event in turn.events}
    last_of_first_batch = max(happened[Finished, number] for number in range(4))
    assert happened[Finished, 2] < last_of_first_batch < happened[FirstToken, 4]


def test_a_prompt_beyond_the_budget_goes_alone_and_whole(policies):
    turns = live(parse_spec("static:token_budget=64", policies, ORDERS), LIMITS)
    batches = [[chunk.num_tokens for chunk in plan.chunks] for turn in turns for plan in turn.plans if plan.chunks]
    assert [600] in batches
    assert sorted(chain.from_iterable(batches)) == sorted(prompt for prompt, _ in LENGTHS)
    assert all(len(batch) == 1 or sum(batch) <= 64 for batch in batches)


def test_it_makes_room_when_the_cache_is_too_small(policies):
    tight = Limits(num_blocks=16, block_size=16, max_num_seqs=4)
    lengths = [(60, 100)] * 6
    turns = live(parse_spec("static", policies, ORDERS), tight, lengths)
    ended = {event.id: event.num_output_tokens for turn in turns for event in turn.events if type(event) is Finished}
    assert ended == dict.fromkeys(range(6), 100)


def test_the_shipped_policies_are_untouched(policies):
    assert "static" in policies
    assert "static" not in POLICIES
