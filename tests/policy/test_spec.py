"""Policies by name: what parses, what does not, and what an error tells."""

from dataclasses import fields

import pytest
from core.driving import ORDERED_SPECS
from hypothesis import given
from hypothesis import strategies as st

from gllm.policy import (
    ORDERS,
    POLICIES,
    EarliestDeadline,
    Orca,
    PrefillFirst,
    Priority,
    Sarathi,
    Throttle,
    format_policy,
    parse_policy,
    policy_options,
)


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("throttle", Throttle()),
        ("throttle:", Throttle()),
        ("sarathi:token_budget=2048", Sarathi(token_budget=2048)),
        ("throttle:max_prefill=4096,kv_threshold=0.1", Throttle(max_prefill=4096, kv_threshold=0.1)),
        ("throttle:ut=false,order=edf", Throttle(ut=False, order=EarliestDeadline())),
        ("throttle:wt=Off,split_decode=1", Throttle(wt=False)),
        ("prefill_first:watermark=0", PrefillFirst(watermark=0.0)),
        ("orca:order=priority,", Orca(order=Priority())),
    ],
)
def test_good_specs(spec, policy):
    assert parse_policy(spec) == policy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best", "unknown policy 'best'; known: throttle, sarathi, prefill_first, orca"),
        ("", "unknown policy ''; known: throttle"),
        ("Orca", "unknown policy 'Orca'"),
        ("sarathi:budget=5", "policy sarathi: unknown option 'budget=5'; known: token_budget, watermark, order"),
        ("sarathi:token_budget", "unknown option 'token_budget'; known: token_budget"),
        ("sarathi:token_budget=many", "token_budget=many: give a whole number, such as 2048"),
        ("sarathi:token_budget=1.5", "token_budget=1.5: give a whole number, such as 2048"),
        ("sarathi:token_budget=0", "policy sarathi: token_budget is 0; it must be at least 1"),
        ("sarathi:watermark=1", "watermark is 1.0; it must be a share of the cache"),
        ("prefill_first:watermark=-0.1", "watermark is -0.1; it must be a share of the cache"),
        ("sarathi:watermark=half", "watermark=half: give a number, such as 0.01"),
        ("throttle:wt=true,wt=false", "policy throttle: wt is given twice"),
        ("throttle:wt=maybe", "wt=maybe: choose one of true, false"),
        ("throttle:order=lifo", "order=lifo: choose one of fcfs, priority, sjf, lpm, edf"),
        ("throttle:kv_threshold=2", "policy throttle: kv_threshold is 2.0; it must be a share"),
    ],
)
def test_bad_specs_are_refused_with_what_exists(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_policy(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", POLICIES)
def test_an_unknown_option_lists_every_known_one(name):
    known = ", ".join(field.name for field in fields(POLICIES[name]))
    with pytest.raises(ValueError, match=f"unknown option 'x=1'; known: {known}$"):
        parse_policy(f"{name}:x=1")


def test_every_order_has_its_name():
    assert all(parse_policy(f"orca:order={name}").order is order for name, order in ORDERS.items())


@pytest.mark.parametrize("spec", ORDERED_SPECS)
def test_round_trip(spec):
    policy = parse_policy(spec)
    assert parse_policy(format_policy(policy)) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_defaults_are_left_out(name):
    assert format_policy(parse_policy(name)) == name


def test_what_differs_is_named():
    policy = Throttle(ut=False, kv_threshold=0.1, order=ORDERS["lpm"])
    assert format_policy(policy) == "throttle:kv_threshold=0.1,ut=false,order=lpm"


@given(
    st.builds(
        Throttle,
        iterations=st.integers(1, 100),
        max_prefill=st.integers(1000, 9999),
        min_prefill=st.integers(1, 1000),
        kv_threshold=st.floats(0, 1, exclude_max=True),
        wt=st.booleans(),
        ut=st.booleans(),
        split_decode=st.booleans(),
        order=st.sampled_from(list(ORDERS.values())),
    )
)
def test_any_throttle_survives_the_round_trip(policy):
    assert parse_policy(format_policy(policy)) == policy


def test_all_options_by_name():
    assert policy_options(Orca(order=Priority())) == {"order": "priority"}
