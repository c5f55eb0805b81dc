"""What makes each of the other policies the one it is: Sarathi, prefill-first, Orca; and the room they share."""

import pytest
from core.driving import Shell, limits, play, request
from core.scripted import Script, prefill

from gllm.core import Preempted, Wait, WaitReason
from gllm.policy import Orca, PrefillFirst, Sarathi


def plans_of(spec, arrivals, **changes):
    return play(Shell(spec, limits(**changes)), arrivals)[1]


def tokens(plan):
    """Prompt tokens of each chunk, and how many decode."""
    return [count for _, _, count, _ in plan["chunks"]], len(plan["decode"])


def decoding(spec, count, **changes):
    """A shell with so many sequences ready to decode once the next result is in."""
    shell = Shell(spec, limits(num_blocks=1000, **changes))
    shell.turn(*((request(key, prompt=1), 99) for key in range(count)))
    return shell


@pytest.mark.parametrize("policy", [Sarathi, PrefillFirst])
def test_a_budget_of_nothing_is_refused(policy):
    with pytest.raises(ValueError, match="token_budget is 0; it must be at least 1"):
        policy(token_budget=0)


def test_sarathi_fills_its_budget():
    plans = plans_of("sarathi:token_budget=10", [(request(0, prompt=25), 1)])
    assert [tokens(plan)[0] for plan in plans] == [[10], [10], [5]]


def test_sarathi_fills_its_budget_with_the_next_prompt():
    plans = plans_of("sarathi:token_budget=10", [(request(key, prompt=6), 1) for key in range(3)])
    assert [tokens(plan)[0] for plan in plans] == [[6, 4], [2, 6]]


def test_sarathi_takes_decodes_first():
    shell = decoding("sarathi:token_budget=10", 3)
    (plan,) = shell.turn((request(9, prompt=30), 1), num_results=1).plans
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (3, 7)


def test_sarathi_stalls_no_decode_for_prompts():
    shell = decoding("sarathi:token_budget=4", 4)
    (plan,) = shell.turn((request(9, prompt=30), 1), num_results=1).plans
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (4, 0)


def test_sarathi_decodes_no_more_than_its_budget():
    shell = decoding("sarathi:token_budget=4", 4)
    shell.turn(*((request(key, prompt=1), 99) for key in (5, 6)), num_results=1)
    for _ in range(6):
        shell.turn(num_results=1)
        assert shell.flight[0][0].num_decode_tokens <= 4


def test_sarathi_leaves_its_watermark_free():
    shell = Shell("sarathi:watermark=0.5", limits(num_blocks=10))
    shell.turn((request(0, prompt=16), 99))
    (plan,) = shell.turn((request(1), 99), (request(2), 99), num_results=1).plans
    assert plan.num_prefill_tokens == 0


def test_the_watermark_does_not_keep_an_idle_engine_from_work():
    plans = plans_of("sarathi:watermark=0.99", [(request(0, prompt=16), 1)], num_blocks=5)
    assert len(plans) == 1


def test_sarathi_promises_its_budget():
    assert Sarathi(token_budget=7).max_batch_tokens(limits()) == 7


def test_prefill_first_never_mixes():
    arrivals = [(request(key, prompt=5), 3 + key) for key in range(6)]
    plans = plans_of("prefill_first:token_budget=10", arrivals, num_blocks=1000)
    assert all(not (plan["chunks"] and plan["decode"]) for plan in plans)


def test_prefill_first_interrupts_decodes_for_a_prompt():
    shell = decoding("prefill_first", 2)
    (plan,) = shell.turn((request(9, prompt=5), 1), num_results=1).plans
    assert (plan.num_prefill_tokens, plan.num_decode_tokens) == (5, 0)


def test_prefill_first_runs_whole_prompts_only():
    plans = plans_of("prefill_first:token_budget=10", [(request(key, prompt=6), 1) for key in range(3)])
    assert [tokens(plan)[0] for plan in plans] == [[6], [6], [6]]


def test_prefill_first_cuts_no_prompt_to_fill_a_large_budget():
    arrivals = [(request(key, prompt=60), 1) for key in range(2)]
    plans = plans_of("prefill_first:token_budget=100", arrivals, max_model_len=80)
    assert [tokens(plan)[0] for plan in plans] == [[60], [60]]


def test_prefill_first_packs_its_budget():
    plans = plans_of("prefill_first:token_budget=12", [(request(key, prompt=6), 1) for key in range(3)])
    assert [tokens(plan)[0] for plan in plans] == [[6, 6], [6]]


def test_prefill_first_runs_a_prompt_beyond_the_budget_alone():
    plans = plans_of("prefill_first:token_budget=10", [(request(0, prompt=25), 1), (request(1, prompt=2), 1)])
    assert [tokens(plan)[0] for plan in plans] == [[25], [2]]


def test_prefill_first_counts_what_is_cached():
    shell = Shell("prefill_first:token_budget=10", limits())
    play(shell, [(request(0, prompt=16, block_hashes=(1, 2, 3, 4)), 1)])
    arrivals = [(request(key, prompt=16, block_hashes=(1, 2, 3, 4)), 1) for key in (1, 2)]
    assert tokens(play(shell, arrivals)[1][0])[0] == [4, 4]


def test_prefill_first_decodes_all():
    shell = decoding("prefill_first:token_budget=2", 2)
    (plan,) = shell.turn(num_results=1).plans
    assert plan.num_decode_tokens == 2


@pytest.mark.parametrize(
    ("budget", "changes", "most"), [(99, {}, 256), (300, {}, 300), (9, {"max_num_seqs": 400}, 400)]
)
def test_prefill_first_promises_the_longest_of_three(budget, changes, most):
    assert PrefillFirst(token_budget=budget).max_batch_tokens(limits(**changes)) == most


def test_orca_mixes_whole_prompts_with_all_decodes():
    shell = Shell("orca", limits(num_blocks=100))
    shell.turn(*((request(key, max_tokens=9), 99) for key in range(2)))
    (plan,) = shell.turn((request(2, prompt=30, max_tokens=9), 1), num_results=1).plans
    assert (plan.num_prefill_tokens, plan.num_decode_tokens) == (30, 2)


def test_orca_reserves_the_longest_output():
    shell = Shell("orca", limits(num_blocks=4))
    turn = shell.turn((request(0, max_tokens=5), 1), (request(1, max_tokens=5), 1))
    assert [chunk.sequence.id for chunk in turn.plans[0].chunks] == [0]


def test_orca_admits_what_fits_beside_the_reservations():
    shell = Shell("orca", limits(num_blocks=6))
    turn = shell.turn((request(0, max_tokens=5), 1), (request(1, max_tokens=5), 1))
    assert [chunk.sequence.id for chunk in turn.plans[0].chunks] == [0, 1]


def test_orca_never_preempts():
    shell = Shell("orca", limits(num_blocks=12))
    events, _ = play(shell, [(request(key, max_tokens=10), 9) for key in range(12)])
    assert not any(type(event) is Preempted for event in events)


def test_orca_does_not_let_anyone_overtake():
    shell = Shell("orca", limits(num_blocks=6))
    sizes = {0: 8, 1: 16, 2: 1}
    turn = shell.turn(*((request(key, max_tokens=size), 1) for key, size in sizes.items()))
    assert [chunk.sequence.id for chunk in turn.plans[0].chunks] == [0]


def test_orca_says_why_it_waits():
    shell = Shell("orca", limits(num_blocks=4, depth=2))
    turn = shell.turn((request(0), 1), (request(1), 1))
    assert turn.wait == Wait(WaitReason.CACHE_FULL)


def test_orca_promises_one_longest_prompt_and_every_decode():
    assert Orca().max_batch_tokens(limits(num_blocks=10, max_num_seqs=7)) == 47


def test_a_waiting_prompt_is_not_overtaken():
    shell = Shell("sarathi", limits(num_blocks=10, max_in_flight=1))
    shell.turn((request(0, prompt=24), 99))
    (plan,) = shell.turn((request(1, prompt=20), 9), (request(2), 9), num_results=1).plans
    assert plan.num_prefill_tokens == 0


def test_the_least_urgent_gives_way():
    shell = Shell("sarathi:order=priority", limits(num_blocks=4))
    events, _ = play(shell, [(request(0, priority=1), 10), (request(1, priority=0), 10)])
    assert {event.id for event in events if type(event) is Preempted} == {0}


def test_prompts_do_not_block_each_other_half_done():
    shell = Shell("sarathi:token_budget=1", limits(num_blocks=4, depth=4))
    events, _ = play(shell, [(request(key, prompt=12), 3) for key in range(3)])
    assert not any(type(event) is Preempted for event in events)


def test_if_another_policy_let_them_the_last_one_gives_way():
    script = Script().then(prefill((0, 4)), prefill((1, 4)), *[Sarathi().decide] * 3)
    shell = Shell(script, limits(num_blocks=3, depth=2))
    shell.turn((request(0, prompt=11), 1), (request(1, prompt=11), 1))
    shell.turn(num_results=1)
    turn = shell.turn(num_results=1)
    assert [event.id for event in turn.events if type(event) is Preempted] == [1]
    assert [chunk.sequence.id for chunk in turn.plans[0].chunks] == [0]


def test_the_most_urgent_of_all_is_never_preempted():
    script = Script().then(prefill((0, 4)), prefill((1, 4)), Sarathi().decide)
    shell = Shell(script, limits(num_blocks=2, depth=2))
    shell.turn((request(0, max_tokens=2), 2), (request(1, max_tokens=2), 2))
    assert shell.turn(num_results=1).wait == Wait(WaitReason.CACHE_FULL)
    assert shell.engine.view.num_running == 2
