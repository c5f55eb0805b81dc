"""A tiny shell: plays requests with true lengths against an engine, and counts every token by itself."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from unittest.mock import patch

from core.lives import Ledger, summary

from gllm.core import DecodeGroup, Engine, Limits, Request, StepResult, Stopped
from gllm.policy import ORDERS, POLICIES, parse_policy

# Of each policy, besides its defaults: budgets so tight that everything has to be cut, and each part switched off.
VARIANTS = {
    "throttle": [
        "max_prefill=64,min_prefill=8",
        "max_prefill=8,min_prefill=1,ut=false",
        "max_prefill=16,min_prefill=2,wt=false",
        "split_decode=false,wt=false,ut=false,max_prefill=20,min_prefill=1",
        "kv_threshold=0.5,iterations=1",
    ],
    "sarathi": ["token_budget=1", "token_budget=7", "token_budget=64,watermark=0.3"],
    "prefill_first": ["token_budget=1", "token_budget=20,watermark=0.3"],
}
POLICY_SPECS = [f"{name}:{options}" for name in POLICIES for options in ["", *VARIANTS.get(name, [])]]
ORDERED_SPECS = [
    f"{spec.removesuffix(':')}{',' if '=' in spec else ':'}order={order}" for spec in POLICY_SPECS for order in ORDERS
]


def limits(**changes):
    return Limits(**{"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, **changes})


def request(key, prompt=4, **fields):
    return Request(id=key, num_prompt_tokens=prompt, **{"arrival_ns": key, **fields})


@contextmanager
def watch_members():
    """Yields a dict that gets the ids of the sequences that step with each plan made meanwhile."""
    members = {}
    advance = DecodeGroup.advance

    def watched(self, plan, *rest):
        members[plan.id] = list(self.members)
        return advance(self, plan, *rest)

    with patch.object(DecodeGroup, "advance", watched):
        yield members


class Shell:
    """Drives one engine. Each turn is checked against the ledger, and kept in `log`."""

    def __init__(self, policy, its_limits, **options):
        policy = parse_policy(policy) if isinstance(policy, str) else policy
        self.engine = Engine(policy, its_limits, **options)
        self.ledger = Ledger(its_limits, policy.max_batch_tokens(its_limits))
        self.flight = deque()  # (plan, ids of the sequences it samples a token for)
        self.log = []  # (what was told, what was said)
        self.now = 0

    def turn(self, *arrivals, aborts=(), num_results=0, failing=(), hashes=None):
        """Hand in `num_results` results, then (request, true length) pairs, then aborts."""
        self.now += 1
        results = [self._result(failing, hashes or {}) for _ in range(num_results)]
        for asked, length in arrivals:
            self.ledger.submit(asked, length)
        for key in aborts:
            self.ledger.abort(key)
        told = (results, [asked for asked, _ in arrivals], list(aborts))
        with watch_members() as members:
            turn = self.engine.turn(*told, now=self.now)
        self.ledger.check_events(turn.events)
        for plan in turn.plans:
            self.flight.append((plan, self.ledger.plan(plan, members.get(plan.id, []))))
        self.check()
        assert self.flight or turn.wait.until_ns or not self.ledger.alive, "nothing will ever wake the shell"
        self.log.append(((*told, self.now), summary(turn, members)))
        return turn

    def _result(self, failing, hashes):
        plan, sampled = self.flight.popleft()
        failed, stopped = self.ledger.complete(plan, sampled, failing)
        self.ledger.published.update(*(hashes[key] for key in stopped if key in hashes))
        return StepResult(
            plan.id,
            [Stopped(key, "error") for key in failed] + [Stopped(key, "stop", hashes.get(key, ())) for key in stopped],
        )

    def check(self):
        self.engine.check_invariants()
        self.ledger.check_returned()
        assert self.engine.num_unfinished == len(self.ledger.alive)
        assert self.engine.view.num_in_flight == len(self.flight) <= self.engine.limits.max_in_flight

    def drain(self):
        """Play on until everything has ended and the cache is empty."""
        for _ in range(100_000):
            if not self.flight:
                break
            self.turn(num_results=1)
        assert not self.flight, "no end in sight"
        assert not self.ledger.alive, "a request was forgotten"
        assert self.engine.view.num_free_blocks == self.engine.limits.num_blocks, "a block was lost"
        assert self.engine.view.num_reserved_blocks == 0

    def replay(self):
        """What a fresh engine says when it is told the same."""
        fresh = Engine(self.engine.policy, self.engine.limits)
        said = []
        for (results, requests, aborts, now), _ in self.log:
            with watch_members() as members:
                turn = fresh.turn(results, requests, aborts, now=now)
            said.append(summary(turn, members))
        return said


def play(shell, arrivals):
    """Submit all at once, then play to the end; all turns' events and plans."""
    first = len(shell.log)
    shell.turn(*arrivals)
    shell.drain()
    said = [turn for _, turn in shell.log[first:]]
    return [event for turn in said for event in turn["events"]], [plan for turn in said for plan in turn["plans"]]
