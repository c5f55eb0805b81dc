"""What every policy keeps to, whatever it is: to be tested here it only has to be listed in POLICIES."""

from dataclasses import replace
from random import Random

import pytest
from core.driving import POLICY_SPECS, Shell, limits, request
from core.scripted import describe
from core.traffic import conversation_hashes

from gllm.policy import ORDERS, POLICIES, parse_policy

SHAPES = {
    "roomy": {},
    "one at a time": {"max_num_seqs": 1},
    "tiny cache": {"num_blocks": 4},
    "blocks of one token": {"num_blocks": 20, "block_size": 1},
    "pipeline": {"depth": 4, "num_blocks": 10},
    "planned ahead": {"depth": 2, "max_in_flight": 4, "num_blocks": 10},
}


class Watched:
    """A policy that is looked over the shoulder: a decision changes nothing, and is the same when asked again."""

    def __init__(self, policy):
        self.policy = policy
        self.order = policy.order
        self.max_batch_tokens = policy.max_batch_tokens

    def decide(self, view):
        before = describe(view)
        decision = self.policy.decide(view)
        assert describe(view) == before, "a policy changed what it saw"
        assert decision == self.policy.decide(view), "a policy changed its mind"
        return decision


def with_order(spec, order):
    return replace(parse_policy(spec), order=ORDERS[order])


def workload(seed, its_limits, num_requests=14):
    """Requests that arrive two by two: (request, true length) pairs."""
    dice = Random(seed)
    size = its_limits.block_size
    longest = min(40, its_limits.max_tokens_per_sequence - 1)
    prompts = [dice.randint(1, longest) for _ in range(num_requests)]
    asked = [
        request(
            key,
            prompt,
            arrival_ns=key // 2,
            priority=dice.randint(0, 2),
            max_tokens=dice.choice([None, 3]),
            deadline_ns=dice.choice([None, key]),
            block_hashes=conversation_hashes(0, 5, key, prompt // size) if key % 3 else (),
        )
        for key, prompt in enumerate(prompts)
    ]
    return [(each, dice.randint(1, 12)) for each in asked]


def run(policy, shape, seed=0):
    """Play the workload; the ledger notices over-grants, losses and stalls."""
    its_limits = limits(**SHAPES[shape])
    shell = Shell(policy, its_limits)
    arrivals = workload(seed, its_limits)
    for index in range(0, len(arrivals), 2):
        shell.turn(*arrivals[index : index + 2], num_results=min(1, len(shell.flight)))
    shell.drain()
    return shell


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", POLICY_SPECS)
def test_progress_without_over_grant(spec, order, shape):
    shell = run(with_order(spec, order), shape)
    assert {event.reason for event in shell.ledger.ended.values()} == {"stop", "length"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", POLICY_SPECS)
def test_the_same_twice(spec, order):
    policies = (with_order(spec, order), with_order(spec, order))
    first, second = (run(policy, "pipeline", seed=1).log for policy in policies)
    assert first == second


@pytest.mark.parametrize("shape", ["planned ahead", "tiny cache"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_is_a_pure_function_of_the_view(name, order, shape):
    run(Watched(with_order(name, order)), shape, seed=2)


@pytest.mark.parametrize("spec", POLICY_SPECS)
def test_batches_hold_what_was_promised_at_most(spec):
    policy = parse_policy(spec)
    shell = Shell(policy, limits(max_num_seqs=4))
    shell.turn(*((request(key, prompt=100), 5) for key in range(12)))
    largest = 0
    while shell.flight:
        plan = shell.flight[0][0]
        largest = max(largest, plan.num_prefill_tokens + plan.num_decode_tokens)
        shell.turn(num_results=1)
    assert 0 < largest <= policy.max_batch_tokens(limits(max_num_seqs=4))


@pytest.mark.parametrize("spec", POLICY_SPECS)
def test_a_policy_is_a_frozen_value(spec):
    policy = parse_policy(spec)
    assert policy == parse_policy(spec)
    assert hash(policy) == hash(parse_policy(spec))
    with pytest.raises(AttributeError):
        policy.order = None
