"""Steps planned before their token is known: when, how far ahead, and what a stop found late costs."""

import pytest
from core.driving import Shell, limits, play, request

from gllm.core import Finished

AHEAD = {"max_in_flight": 2}  # of a pipeline of one stage


def ahead_by_one(length=2, **fields):
    """A shell that has planned two steps of one request, its first token just back."""
    shell = Shell("sarathi", limits(**AHEAD))
    shell.turn((request(0, **fields), length))
    return shell


def test_a_step_is_planned_before_its_token_is_known():
    assert [plan.id for plan in Shell("sarathi", limits(**AHEAD)).turn((request(0), 9)).plans] == [0, 1]


def test_never_two_steps_beyond_the_last_known_token():
    shell = Shell("sarathi", limits(max_in_flight=4))
    assert len(shell.turn((request(0), 9)).plans) == 2
    assert len(shell.turn(num_results=1).plans) == 1


def test_only_once_a_full_pipeline_follows():
    shell = Shell("sarathi:token_budget=4", limits(depth=2, max_in_flight=3))
    assert len(shell.turn((request(0), 9)).plans) == 1
    plans = shell.turn((request(1), 9)).plans
    assert [plan.num_decode_tokens for plan in plans] == [0, 1]


def test_a_pipeline_just_full_never_plans_ahead():
    shell = Shell("sarathi", limits(depth=2, max_in_flight=2))
    assert len(shell.turn((request(0), 9)).plans) == 1


def test_a_stop_found_late_discards_one_token():
    shell = ahead_by_one()
    shell.turn(num_results=1)
    late = shell.flight[1][0]
    assert shell.turn(num_results=1).events == [Finished(0, "stop", 2)]
    assert late.num_discarded == 1


def test_its_blocks_are_freed_when_the_late_plan_is_back():
    shell = ahead_by_one(length=1)
    shell.turn(num_results=1)
    assert (shell.engine.num_unfinished, shell.engine.view.num_free_blocks) == (0, 62)
    shell.turn(num_results=1)
    assert shell.engine.view.num_free_blocks == 64


def test_it_leaves_the_rotation_at_once():
    shell = ahead_by_one(length=1)
    assert shell.turn(num_results=1).plans == []


def test_a_stop_in_time_discards_nothing():
    shell = Shell("sarathi", limits(depth=2, max_in_flight=2))
    shell.turn((request(0), 3))
    plans = [shell.flight[0][0]]
    while shell.flight:
        plans += shell.turn(num_results=1).plans
    assert [plan.num_discarded for plan in plans] == [0, 0, 0]


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_request_alone_wastes_one_step_at_most(depth, length):
    shell = Shell("throttle", limits(depth=depth, max_in_flight=depth + 2))
    events, plans = play(shell, [(request(0), length)])
    assert events[-1] == Finished(0, "stop", length)
    assert len(plans) in (length, length + 1)


def test_a_limit_is_known_in_time():
    shell = ahead_by_one(length=9, max_tokens=2)
    shell.drain()
    assert shell.engine.view.num_plans == 2


def test_an_abort_discards_all_that_is_on_the_road():
    shell = ahead_by_one(length=9)
    first, second = (plan for plan, _ in shell.flight)
    assert shell.turn(aborts=[0]).events[-1] == Finished(0, "abort", 0)
    assert (first.num_discarded, second.num_discarded) == (1, 1)
    assert shell.engine.view.num_free_blocks == 62


def test_an_abort_of_a_step_that_joined_long_ago_counts_known_tokens():
    shell = ahead_by_one(length=9)
    for _ in range(3):
        shell.turn(num_results=1)
    assert shell.turn(aborts=[0]).events == [Finished(0, "abort", 3)]


def test_a_failure_takes_its_own_token_along():
    shell = ahead_by_one(length=9)
    first, second = (plan for plan, _ in shell.flight)
    assert shell.turn(num_results=1, failing=[0]).events == [Finished(0, "error", 0)]
    assert (first.num_discarded, second.num_discarded) == (1, 1)


def test_who_goes_on_is_not_disturbed_by_a_late_stop():
    events, _ = play(Shell("sarathi", limits(**AHEAD)), [(request(0), 2), (request(1), 5)])
    assert [event for event in events if type(event) is Finished] == [Finished(0, "stop", 2), Finished(1, "stop", 5)]
