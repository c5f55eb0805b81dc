"""Whatever the traffic and the policy: nothing lost, nothing stalls, every token counted, equal inputs equal plans."""

from random import Random

import pytest
from core.driving import ORDERED_SPECS, Shell
from core.traffic import draw_limits, draw_request, run_traffic
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gllm.core import Scheduled


@pytest.mark.parametrize("spec", ORDERED_SPECS)
def test_random_traffic(spec):
    for seed in range(3):
        run_traffic(spec, f"{spec} {seed}", num_turns=60)


@pytest.mark.parametrize("spec", ORDERED_SPECS)
def test_equal_inputs_give_equal_plans(spec):
    shell = run_traffic(spec, spec, num_turns=60)
    assert shell.replay() == [said for _, said in shell.log]


def test_random_traffic_covers_what_can_happen():
    shells = [run_traffic("throttle", seed, num_turns=100) for seed in range(10)]
    reasons = {event.reason for shell in shells for event in shell.ledger.ended.values()}
    assert reasons >= {"stop", "length", "abort", "error"}
    plans = [plan for shell in shells for _, said in shell.log for plan in said["plans"]]
    assert any(plan["preempted"] for plan in plans)
    events = [event for shell in shells for _, said in shell.log for event in said["events"]]
    assert any(type(event) is Scheduled and event.num_cached_tokens for event in events)


class EngineMachine(RuleBasedStateMachine):
    """One engine under one policy; hypothesis chooses what happens, and shrinks what fails."""

    @initialize(spec=st.sampled_from(ORDERED_SPECS), seed=st.integers(0, 1000))
    def start(self, spec, seed):
        self.shell = Shell(spec, draw_limits(Random(seed)))
        self.num_requests = 0

    @rule(seeds=st.lists(st.integers(0, 1000), max_size=4))
    def arrive(self, seeds):
        first, shell = self.num_requests, self.shell
        self.num_requests += len(seeds)
        drawn = [
            draw_request(Random(seed), first + index, shell.now, shell.engine.limits)
            for index, seed in enumerate(seeds)
        ]
        shell.turn(*[(asked, length) for asked, length, _ in drawn])

    @precondition(lambda self: self.shell.flight)
    @rule(count=st.integers(1, 3))
    def come_back(self, count):
        self.shell.turn(num_results=min(count, len(self.shell.flight)))

    @precondition(lambda self: self.shell.flight)
    @rule(data=st.data())
    def fail(self, data):
        keys = data.draw(st.lists(st.integers(0, self.num_requests), max_size=3, unique=True))
        self.shell.turn(num_results=1, failing=keys)

    @rule(data=st.data())
    def abort(self, data):
        keys = data.draw(st.lists(st.integers(0, self.num_requests), min_size=1, max_size=3))
        self.shell.turn(aborts=keys)

    def teardown(self):
        if hasattr(self, "shell"):
            self.shell.drain()
            assert len(self.shell.ledger.ended) == self.num_requests
            assert self.shell.replay() == [said for _, said in self.shell.log]


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
