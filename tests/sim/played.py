"""Small simulations with times that a reader can work out by hand."""

from __future__ import annotations

from random import Random

from sim.costs import FixedCost

from gllm.core import Engine, Limits, Request
from gllm.policy import parse_policy
from gllm.report.recorder import Recorder
from gllm.sim.driver import Arrival, Simulation
from gllm.sim.pipeline import recurrence

POLICY_SPECS = ("throttle", "throttle:wt=false,ut=false", "sarathi:token_budget=64", "prefill_first", "orca")


def arrival(number, *, at=0, prompt=10, output=5, **options):
    request = Request(id=number, num_prompt_tokens=prompt, arrival_ns=at, **options)
    return Arrival(request, output)


def tied_traffic(count, seed=0, *, gap_ns=10):
    """Arrivals on a coarse grid, several at once, with prompts that share prefixes."""
    rng = Random(seed)
    time = 0
    for number in range(count):
        time += rng.choice((0, 0, 1, 2)) * gap_ns
        prompt = rng.randint(1, 80)
        stem = rng.randrange(4) * 1000
        hashes = tuple(range(stem, stem + prompt // 4))
        output = rng.randint(1, 30)
        limit = rng.choice((None, None, output, 40))
        yield arrival(number, at=time, prompt=prompt, output=output, max_tokens=limit, block_hashes=hashes)


class Played:
    """A finished simulation: its record, its engine, and whatever the log wrote."""

    def __init__(self, arrivals, *, policy="sarathi", cost=None, log=None, pipeline=recurrence, **limits):
        cost = cost or FixedCost()
        limits = Limits(**{"num_blocks": 10_000, "depth": cost.num_stages, **limits})
        self.engine = Engine(parse_policy(policy), limits, keep_snapshots=log is not None)
        self.recorder = Recorder(cost.num_stages)
        self.simulation = Simulation(self.engine, arrivals, cost, self.recorder, log, pipeline)
        self.limits = limits

    def run(self):
        self.simulation.run()
        self.engine.check_invariants()
        assert not self.engine.num_unfinished
        return self.recorder.record(
            config={},
            mode="simulated",
            wall_s=0.0,
            decision_sha256=None,
            num_blocks=self.limits.num_blocks,
            block_size=self.limits.block_size,
        )


def play(arrivals, **options):
    return Played(arrivals, **options).run()


class Events:
    """Stands in for a decision log: keeps what it is given, line by line."""

    def __init__(self):
        self.lines = []

    def write(self, now, results, requests, aborts, turn):
        plans = [(p.id, p.num_prefill_tokens, p.num_decode_tokens, p.num_free_blocks, p.saw) for p in turn.plans]
        ids = [request.id for request in requests]
        self.lines.append((now, list(results), ids, list(aborts), plans, list(turn.events), turn.wait))
