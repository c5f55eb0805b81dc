"""The shell's own duties: waking a policy on time, and gaps of sequences that had stopped already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sim.costs import FixedCost
from sim.played import POLICY_SPECS, Played, arrival, tied_traffic

from gllm.core import Engine, Limits, Wait, WaitReason
from gllm.policy import ORDERS, Fcfs, Sarathi
from gllm.report.metrics import summarize
from gllm.report.recorder import Recorder
from gllm.sim.driver import Simulation

MS = 1_000_000


@dataclass(frozen=True)
class Hold:
    """Holds every prompt for a while after its arrival."""

    hold_ns: int = MS
    order: Fcfs = ORDERS["fcfs"]

    def decide(self, view):
        first = next(iter(view.waiting), None)
        due = first.request.arrival_ns + self.hold_ns if first else 0
        return Wait(WaitReason.HELD, due) if due > view.now_ns else Sarathi().decide(view)

    def max_batch_tokens(self, limits):
        return Sarathi().max_batch_tokens(limits)


def test_a_policy_is_woken_on_time_with_a_batch_on_the_road():
    recorder = Recorder(2)
    engine = Engine(Hold(), Limits(num_blocks=100, depth=2))
    cost = FixedCost(num_stages=2, batch_ns=50 * MS)
    Simulation(engine, [arrival(0, output=1), arrival(1, at=MS * 3 // 2, output=1)], cost, recorder).run()
    record = recorder.record(
        config={}, mode="simulated", wall_s=0.0, decision_sha256=None, num_blocks=100, block_size=16
    )
    assert record.requests["scheduled_ns"].tolist() == [MS, MS * 5 // 2]


def test_what_a_policy_asked_for_before_something_happened_is_void():
    """It waits until 10 ms; at 5 ms a request arrives and it says 20 ms: nobody asks at 10 ms, as no real loop does."""
    asked = []

    @dataclass(frozen=True)
    class Patient(Hold):
        def decide(self, view):
            asked.append(view.now_ns // MS)
            due = 10 * MS * view.num_waiting
            return Wait(WaitReason.HELD, due) if due > view.now_ns else Sarathi().decide(view)

    engine = Engine(Patient(), Limits(num_blocks=100))
    Simulation(engine, [arrival(0, output=1), arrival(1, at=5 * MS, output=1)], FixedCost(), Recorder(1)).run()
    assert asked[:3] == [0, 5, 20]


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("policy", POLICY_SPECS)
def test_there_are_as_many_gaps_as_tokens_after_the_first(policy, ahead):
    cost = FixedCost(num_stages=2, batch_ns=7, token_ns=1, host_ns=3, return_ns=2)
    limits = {"block_size": 4, "num_blocks": 120, "max_num_seqs": 16, "max_in_flight": 2 + ahead}
    played = Played(tied_traffic(200), policy=policy, cost=cost, **limits)
    record = played.run()
    shared = np.where(record.batches["previous"] >= 0, record.batches["num_continuing"] - record.num_discarded, 0)
    served = record.requests["num_output_tokens"] > 0
    assert shared.sum() + len(record.gaps) == (record.requests["num_output_tokens"][served] - 1).sum()
    assert summarize(record, slo_ttft_s=None, slo_tpot_s=None)["num_finished"] == served.sum()


@pytest.mark.parametrize("policy", POLICY_SPECS)
def test_the_engine_knows_of_requests_so_much_later(policy):
    options = {"policy": policy, "block_size": 4, "num_blocks": 120, "max_num_seqs": 16, "max_in_flight": 2}
    times = {"num_stages": 2, "batch_ns": 7, "token_ns": 1, "host_ns": 3, "return_ns": 2}
    at_once, later = (
        Played(tied_traffic(60), cost=FixedCost(**times, intake_ns=intake_ns), **options).run()
        for intake_ns in (0, 500)
    )
    assert (later.requests["arrival_ns"] == at_once.requests["arrival_ns"]).all()
    served = at_once.requests["num_output_tokens"] > 0
    for name in ("scheduled_ns", "first_token_ns", "finish_ns"):
        assert (later.requests[name][served] == at_once.requests[name][served] + 500).all(), name
