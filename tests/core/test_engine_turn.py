"""What one turn promises: its order, its events, its reasons to wait, and what it refuses."""

from dataclasses import replace

import pytest
from core.driving import Shell, limits, play, request
from core.scripted import FAR, Script, decode, decode_named, prefill

from gllm.core import (
    Engine,
    Finished,
    FirstToken,
    Limits,
    PlanError,
    Rejected,
    Request,
    Scheduled,
    Snapshot,
    StallError,
    StepResult,
    Stopped,
    Wait,
    WaitReason,
)


def scripted(*steps, **changes):
    """A shell whose policy follows the steps."""
    options = {"keep_snapshots": True} if changes.pop("keep_snapshots", False) else {}
    return Shell(Script().then(*steps), limits(**changes), **options)


def test_results_come_before_requests_before_aborts():
    shell = Shell("sarathi", limits(max_num_seqs=1))
    shell.turn((request(0), 1))
    turn = shell.turn((request(1), 1), (request(2), 1), aborts=[0, 1], num_results=1)
    assert turn.events == [FirstToken(0), Finished(0, "stop", 1), Finished(1, "abort", 0), Scheduled(2, 0)]


def test_a_freed_place_is_taken_in_the_same_turn():
    shell = Shell("sarathi", limits(max_num_seqs=1))
    shell.turn((request(0), 1), (request(1), 1))
    (plan,) = shell.turn(num_results=1).plans
    assert [chunk.sequence.id for chunk in plan.chunks] == [1]


def test_errors_come_before_tokens_before_stops_before_limits():
    shell = Shell("sarathi", limits())
    shell.turn((request(0, max_tokens=1), 9), (request(1), 1), (request(2), 9))
    turn = shell.turn(num_results=1, failing=[2])
    assert turn.events == [
        Finished(2, "error", 0),
        FirstToken(0),
        FirstToken(1),
        Finished(1, "stop", 1),
        Finished(0, "length", 1),
    ]


def test_several_results_of_one_turn_come_back_in_order():
    shell = Shell("sarathi:token_budget=4", limits(depth=2))
    shell.turn((request(0), 1), (request(1), 1))
    turn = shell.turn(num_results=2)
    assert [event.id for event in turn.events if type(event) is Finished] == [0, 1]


def test_a_failed_step_gives_no_token():
    shell = Shell("sarathi", limits())
    shell.turn((request(0), 9))
    shell.turn(num_results=1)
    assert shell.turn(num_results=1, failing=[0]).events == [Finished(0, "error", 1)]


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_no_step_is_planned_beyond_the_limit(max_in_flight):
    shell = Shell("sarathi", limits(max_in_flight=max_in_flight))
    events, plans = play(shell, [(request(0, max_tokens=3), 99)])
    assert len(plans) == 3
    assert events[-1] == Finished(0, "length", 3)


def test_without_max_tokens_the_models_length_is_the_limit():
    events, _ = play(Shell("sarathi", limits(max_model_len=10)), [(request(0, prompt=4), 99)])
    assert events[-1] == Finished(0, "length", 6)


def test_the_whole_cache_is_a_limit_too():
    events, _ = play(Shell("sarathi", limits(num_blocks=2)), [(request(0, prompt=4), 99)])
    assert events[-1] == Finished(0, "length", 4)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"max_model_len": 8}, "the model's length, 8"), ({"num_blocks": 2}, "the whole KV cache, 8")],
)
def test_what_can_never_fit_is_rejected_with_a_reason(changes, cause):
    shell = Shell("sarathi", limits(**changes))
    turn = shell.turn((request(0, prompt=8), 1))
    assert turn.events == [Rejected(0, f"prompt of 8 tokens and one to answer exceed {cause}")]
    assert turn.wait == Wait(WaitReason.NO_WORK)


def test_a_request_submitted_twice_is_refused():
    shell = Shell("sarathi", limits())
    shell.turn((request(0), 1))
    with pytest.raises(ValueError, match="request 0 was submitted twice"):
        shell.engine.turn(requests=[request(0)], now=2)


def test_an_id_that_ended_can_be_used_again():
    shell = Shell("sarathi", limits())
    shell.turn((request(0), 1), aborts=[0])
    assert shell.engine.turn(requests=[request(0)], now=2).events == [Scheduled(0, 0)]


@pytest.mark.parametrize("plan", [1, 7, -1])
def test_results_out_of_order_are_refused(plan):
    shell = Shell("sarathi:token_budget=4", limits(depth=2))
    shell.turn((request(0), 1), (request(1), 1))
    with pytest.raises(ValueError, match=f"result of plan {plan}; plan 0 is the next"):
        shell.engine.turn([StepResult(plan)], now=2)


def test_a_result_of_nothing_is_refused():
    with pytest.raises(ValueError, match="result of plan 0"):
        Shell("sarathi", limits()).engine.turn([StepResult(0)], now=1)


@pytest.mark.parametrize("reason", ["stop", "error"])
def test_what_ended_already_may_stop_again(reason):
    shell = Shell("sarathi", limits())
    shell.turn((request(0), 1))
    shell.engine.turn(aborts=[0], now=2)
    assert shell.engine.turn([StepResult(0, [Stopped(0, reason)])], now=3).events == []


def test_an_abort_of_the_unknown_is_ignored():
    assert Shell("sarathi", limits()).turn(aborts=[5]).events == []


def test_an_aborted_waiting_request_leaves_the_queue():
    shell = scripted()
    shell.turn((request(0), 1), (request(1), 1))
    shell.turn(aborts=[0])
    assert [sequence.id for sequence in shell.engine.view.waiting] == [1]
    assert shell.engine.view.num_waiting_tokens == 4


def test_an_aborted_half_done_prompt_gives_everything_back():
    shell = scripted(prefill((0, 4)))
    shell.turn((request(0, prompt=8), 1))
    shell.turn(num_results=1)
    shell.turn(aborts=[0])
    assert shell.engine.view.num_free_blocks == 64
    assert shell.engine.view.num_waiting_tokens == 0


def test_wait_no_work():
    assert Shell("sarathi", limits()).turn().wait == Wait(WaitReason.NO_WORK)


def test_wait_pipeline_full():
    shell = Shell("sarathi", limits())
    assert shell.turn((request(0), 9)).wait == Wait(WaitReason.PIPELINE_FULL)


def test_wait_nothing_ready():
    shell = Shell("sarathi", limits(depth=2))
    assert shell.turn((request(0), 9)).wait == Wait(WaitReason.NOTHING_READY)


def test_wait_as_the_policy_says():
    shell = scripted(lambda _: Wait(WaitReason.HELD, until_ns=9))
    assert shell.engine.turn(requests=[request(0)], now=8).wait == Wait(WaitReason.HELD, until_ns=9)


def test_a_policy_is_not_asked_when_nothing_can_be_planned():
    shell = scripted(prefill((0, 4)))
    shell.turn()
    shell.turn((request(0), 2))
    assert shell.engine.policy.num_asked == 1


def test_a_policy_is_asked_until_it_waits():
    shell = scripted(prefill((0, 4)), prefill((1, 4)), depth=4)
    turn = shell.turn((request(0), 1), (request(1), 1), (request(2), 1))
    assert (len(turn.plans), turn.wait.reason) == (2, WaitReason.HELD)
    assert shell.engine.policy.num_asked == 3


@pytest.mark.parametrize("until_ns", [4, 5])
def test_a_wait_until_the_past_is_an_error(until_ns):
    engine = Engine(Script().then(lambda _: Wait(WaitReason.HELD, until_ns)), limits())
    with pytest.raises(PlanError, match=rf"waits until {until_ns} ns, and it is 5 ns already"):
        engine.turn(requests=[request(0)], now=5)


def test_a_wait_for_nothing_is_a_stall():
    engine = Engine(Script().then(lambda _: Wait(WaitReason.HELD)), limits())
    with pytest.raises(StallError, match=r"waits \(held\) with nothing on the road"):
        engine.turn(requests=[request(0)], now=5)


def test_waiting_for_what_is_on_the_road_is_no_stall():
    shell = scripted(prefill((0, 4)), lambda _: Wait(WaitReason.CACHE_FULL), depth=2)
    assert shell.turn((request(0), 1), (request(1), 1)).wait == Wait(WaitReason.CACHE_FULL)


def test_unfinished_prompts_may_follow_themselves_into_the_pipeline():
    shell = scripted(prefill((0, 4)), prefill((0, 6)), depth=2)
    plans = shell.turn((request(0, prompt=10), 1)).plans
    chunks = [(chunk.start, chunk.num_tokens, chunk.final) for plan in plans for chunk in plan.chunks]
    assert chunks == [(0, 4, False), (4, 6, True)]


def test_only_the_last_chunk_brings_a_token():
    shell = scripted(prefill((0, 4)), prefill((0, 4)), depth=2)
    plans = shell.turn((request(0, prompt=8), 1)).plans
    assert [plan.num_sampled for plan in plans] == [0, 1]
    assert shell.turn(num_results=1).events == []


def ready(*keys, **changes):
    """A shell whose sequences have their first token back."""
    shell = scripted(prefill(*((key, 4) for key in keys)), **changes)
    shell.turn(*((request(key), 99) for key in keys))
    shell.turn(num_results=1)
    return shell


def then(shell, *steps, **options):
    shell.engine.policy.then(*steps)
    return shell.turn(**options)


def members(shell):
    return shell.flight[-1][1]


def test_counted_decodes_take_the_head_of_the_rotation():
    shell = ready(0, 1, 2)
    then(shell, decode(2))
    assert len(members(shell)) == 2
    assert shell.engine.view.num_ready == 1


def test_who_stayed_behind_is_next():
    shell = ready(0, 1, 2)
    then(shell, decode(2))
    first = members(shell)
    then(shell, decode(1), num_results=1)
    assert sorted([*first, *members(shell)]) == [0, 1, 2]


def test_who_stayed_behind_is_before_those_that_came_later():
    shell = scripted(prefill(*((key, 4) for key in range(3))), prefill((3, 4)), depth=3)
    shell.turn(*((request(key), 99) for key in range(4)))
    shell.turn(num_results=2)
    then(shell, decode(2), decode(1))
    assert sorted(key for _, keys in shell.flight for key in keys) == [0, 1, 2]


def test_named_decodes_step_just_those():
    shell = ready(0, 1, 2, 3)
    then(shell, decode_named(3, 1))
    assert sorted(members(shell)) == [1, 3]


def test_named_decodes_with_a_prompt():
    shell = ready(0, 1)
    shell.turn((request(2), 99))
    named, chunk = decode_named(1), prefill((2, 4))
    turn = then(shell, lambda view: replace(chunk(view), decode=named(view).decode))
    assert (turn.plans[0].num_prefill_tokens, turn.plans[0].num_decode_tokens) == (4, 1)


def test_groups_that_came_back_apart_step_together():
    shell = scripted(prefill((0, 4)), prefill((1, 4)), prefill((2, 4)), depth=3)
    shell.turn(*((request(key), 99) for key in range(3)))
    shell.turn(num_results=3)
    then(shell, decode(2))
    assert members(shell) == [0, 1]


def test_a_group_that_goes_on_is_the_same_object_and_names_no_member():
    shell = ready(0, 1)
    first = then(shell, decode(2)).plans[0]
    second = then(shell, decode(2), num_results=1).plans[0]
    assert second.group is first.group
    assert (len(first.joined), len(second.joined)) == (2, 0)


def test_a_plan_names_the_plan_whose_tokens_it_feeds_in():
    shell = ready(0)
    first = then(shell, decode(1)).plans[0]
    shell.turn((request(1), 99), num_results=1)
    second = then(shell, prefill((1, 4), decode=1)).plans[0]
    third = then(shell, decode(2), num_results=1).plans[0]
    assert [plan.depends_on for plan in (first, second, third)] == [0, 1, 2]


def test_a_prompt_depends_on_no_plan():
    shell = scripted(prefill((0, 4)))
    assert shell.turn((request(0), 1)).plans[0].depends_on == -1


def test_a_sequence_grows_by_a_block_when_its_last_one_is_full():
    shell = ready(0)
    grown = [then(shell, decode(1), num_results=len(shell.flight)).plans[0].grown for _ in range(5)]
    assert [len(each) for each in grown] == [1, 0, 0, 0, 1]


def test_snapshots_are_what_the_policy_saw():
    shell = scripted(prefill((0, 4)), prefill((1, 3)), depth=2, keep_snapshots=True)
    saw = [plan.saw for plan in shell.turn((request(0), 1), (request(1), 1)).plans]
    assert saw == [Snapshot(2, 8, 0, 0, 0, 64, 0), Snapshot(1, 4, 1, 0, 0, 63, 1)]


def test_no_snapshots_unless_asked_for():
    assert scripted(prefill((0, 4))).turn((request(0), 1)).plans[0].saw is None


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_model_len", "max_num_seqs", "depth"])
def test_limits_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        limits(**{name: 0})


def test_the_pipeline_needs_a_micro_batch_per_stage():
    with pytest.raises(ValueError, match="max_in_flight is 3; a pipeline of depth 4"):
        limits(depth=4, max_in_flight=3)


def test_by_default_as_many_are_on_the_road_as_there_are_stages():
    assert Limits(num_blocks=1, depth=4).max_in_flight == 4


@pytest.mark.parametrize(("field", "value"), [("num_prompt_tokens", 0), ("max_tokens", 0)])
def test_an_empty_request_is_refused(field, value):
    with pytest.raises(ValueError, match=r"at least (one|1)"):
        Request(**{"id": 0, "num_prompt_tokens": 1, "arrival_ns": 0, field: value})


def test_the_view_counts():
    shell = scripted(prefill((0, 4), (1, 4)), prefill((2, 4)), depth=2, num_blocks=10)
    shell.turn((request(0), 99), (request(1, max_tokens=2), 99), (request(2, prompt=8), 99), (request(3), 99))
    shell.turn(num_results=1)
    view = shell.engine.view
    assert (view.now_ns, view.num_plans, view.num_in_flight) == (2, 2, 1)
    assert (view.num_waiting, view.num_running, view.num_decoding, view.num_ready) == (1, 3, 2, 2)
    assert view.num_prefilling == 1
    assert (view.num_waiting_tokens, view.num_free_blocks, view.kv_free) == (8, 7, 0.7)
    assert [sequence.id for sequence in view.prefilling] == [2]
    assert [sequence.id for sequence in view.running if view.on_road(sequence)] == [2]
    assert view.num_reserved_blocks == 10 + 2 + 10
    assert [view.decode_blocks(count) for count in range(3)] == [0, 1, 2]
    assert [view.chunk_blocks(sequence, 4) for sequence in view.prefilling] == [1]
    assert [view.chunk_blocks(sequence, 5) for sequence in view.waiting] == [2]
    assert [sequence.num_prompt_tokens for sequence in view.running] == [4, 4, 8]
    assert [sequence.num_output_tokens for sequence in view.running] == [1, 1, 0]


def test_reprs_say_what_matters():
    shell = ready(0)
    (plan,) = then(shell, decode(1)).plans
    assert repr(plan) == "Plan(1: 0 prefill + 1 decode tokens)"
    assert repr(next(iter(shell.engine.view.running))) == "Sequence(0, decoding, 6 tokens)"


@pytest.mark.parametrize(
    "counter",
    ["num_waiting", "num_prefilling", "num_running", "num_decoding", "num_waiting_tokens", "num_reserved_blocks"],
)
def test_check_invariants_notices_a_miscount(counter):
    shell = ready(0)
    setattr(shell.engine.view, counter, getattr(shell.engine.view, counter) + 1)
    with pytest.raises(AssertionError):
        shell.engine.check_invariants()


def test_a_shell_may_sleep_until_the_policy_wakes():
    shell = scripted(lambda _: Wait(WaitReason.HELD, until_ns=FAR), prefill((0, 4)))
    shell.engine.turn(requests=[request(0)], now=1)
    assert len(shell.engine.turn(now=FAR).plans) == 1
