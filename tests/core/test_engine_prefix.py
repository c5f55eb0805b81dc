"""Prefix reuse: how many tokens are found, when, and when not."""

import pytest
from core.driving import Shell, limits, play, request
from core.scripted import Script, preempt, prefill

from gllm.core import Scheduled

HASHES = (1, 2, 3, 4)


def cached(events, key):
    return next(event.num_cached_tokens for event in events if type(event) is Scheduled and event.id == key)


def second_request(shell, prompt=16, hashes=HASHES, **options):
    """How many tokens the second of two equal prompts finds, and the plans it takes."""
    play(shell, [(request(0, prompt=16, block_hashes=HASHES), 1)])
    events, plans = play(shell, [(request(1, prompt=prompt, block_hashes=hashes, **options), 1)])
    return cached(events, 1), [plan["chunks"] for plan in plans]


def test_a_known_prefix_is_not_computed_again():
    found, plans = second_request(Shell("sarathi", limits()), prompt=20, hashes=(*HASHES, 5))
    assert (found, plans) == (16, [[(1, 16, 4, True)]])


def test_one_token_at_least_is_left_to_compute():
    found, plans = second_request(Shell("sarathi", limits()))
    assert (found, plans) == (12, [[(1, 12, 4, True)]])


def test_only_the_common_prefix_counts():
    found, _ = second_request(Shell("sarathi", limits()), hashes=(1, 2, 8, 4))
    assert found == 8


def test_no_hit_without_hashes():
    found, _ = second_request(Shell("sarathi", limits()), hashes=())
    assert found == 0


def test_no_hit_when_switched_off():
    found, _ = second_request(Shell("sarathi", limits(prefix_caching=False)))
    assert found == 0


def test_no_hit_on_what_was_evicted():
    shell = Shell("sarathi", limits(num_blocks=5))
    play(shell, [(request(0, prompt=16, block_hashes=HASHES), 1)])
    play(shell, [(request(1, prompt=18), 1)])
    events, _ = play(shell, [(request(2, prompt=16, block_hashes=HASHES), 1)])
    assert cached(events, 2) == 0


def test_the_head_of_a_prefix_outlives_its_tail():
    shell = Shell("sarathi", limits(num_blocks=5))
    play(shell, [(request(0, prompt=16, block_hashes=HASHES), 1)])
    play(shell, [(request(1, prompt=9), 1)])
    events, _ = play(shell, [(request(2, prompt=16, block_hashes=HASHES), 1)])
    assert cached(events, 2) == 8


def test_equal_prompts_of_one_batch_do_not_share_and_lose_nothing():
    shell = Shell("sarathi", limits())
    events, _ = play(shell, [(request(key, prompt=16, block_hashes=HASHES), 3) for key in range(2)])
    assert (cached(events, 0), cached(events, 1)) == (0, 0)


def test_a_prefix_on_the_road_is_shared_by_the_next_batch():
    shell = Shell("sarathi:token_budget=16", limits(depth=2))
    turn = shell.turn(*((request(key, prompt=16, block_hashes=HASHES), 3) for key in range(2)))
    assert cached(turn.events, 1) == 12
    shell.drain()


def test_only_full_blocks_of_a_chunk_are_shared():
    shell = Shell(Script().then(prefill((0, 10)), prefill((1, 8))), limits(depth=2))
    turn = shell.turn(*((request(key, prompt=16, block_hashes=HASHES), 3) for key in range(2)))
    assert cached(turn.events, 1) == 8


def test_a_shared_block_costs_nothing():
    shell = Shell(Script().then(prefill((0, 16)), prefill((1, 4))), limits(depth=2))
    turn = shell.turn(*((request(key, prompt=16, block_hashes=HASHES), 3) for key in range(2)))
    assert [plan.num_free_blocks for plan in turn.plans] == [60, 59]


def test_outputs_can_be_reused_once_the_shell_names_them():
    shell = Shell("sarathi", limits())
    shell.turn((request(0, prompt=8, block_hashes=HASHES[:2]), 9))
    while shell.flight:
        shell.turn(num_results=1, hashes={0: HASHES})
    events, _ = play(shell, [(request(1, prompt=17, block_hashes=HASHES), 1)])
    assert cached(events, 1) == 16


def test_the_last_output_token_was_never_computed():
    shell = Shell("sarathi", limits())
    shell.turn((request(0, prompt=8, block_hashes=HASHES[:2]), 8))
    while shell.flight:
        shell.turn(num_results=1, hashes={0: HASHES})
    events, _ = play(shell, [(request(1, prompt=17, block_hashes=HASHES), 1)])
    assert cached(events, 1) == 12


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_named_outputs_of_a_request_without_hashes(prefix_caching):
    shell = Shell("sarathi", limits(prefix_caching=prefix_caching))
    shell.turn((request(0, prompt=8), 9))
    while shell.flight:
        shell.turn(num_results=1, hashes={0: HASHES})
    events, _ = play(shell, [(request(1, prompt=17, block_hashes=HASHES), 1)])
    assert cached(events, 1) == 16 * prefix_caching


def test_what_failed_is_not_reused():
    shell = Shell("sarathi", limits())
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 9))
    shell.turn(num_results=1, failing=[0])
    events, _ = play(shell, [(request(1, prompt=16, block_hashes=HASHES), 1)])
    assert cached(events, 1) == 0


def test_what_was_aborted_can_be_reused():
    shell = Shell("sarathi", limits())
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 9))
    shell.turn(aborts=[0], num_results=1)
    events, _ = play(shell, [(request(1, prompt=16, block_hashes=HASHES), 1)])
    assert cached(events, 1) == 12


def test_a_preempted_sequence_finds_its_own_prefix():
    script = Script().then(prefill((0, 16)), preempt(0), prefill((0, 1)))
    shell = Shell(script, limits())
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 9))
    (chunk,) = shell.turn(num_results=1).plans[0].chunks
    assert (chunk.start, chunk.num_tokens) == (16, 1)


def test_a_look_into_the_cache_is_up_to_date():
    shell = Shell(Script(), limits())
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 9), (request(1, prompt=16, block_hashes=HASHES), 9))
    view = shell.engine.view
    looker = list(view.waiting)[1]
    assert (view.cached_tokens(looker), view.chunk_blocks(looker, 16)) == (0, 4)
    shell.engine.policy.then(prefill((0, 8)))
    shell.turn()
    assert (view.cached_tokens(looker), view.chunk_blocks(looker, 8)) == (8, 2)


def test_taking_an_evictable_block_uses_up_free_room():
    shell = Shell(Script().then(prefill((0, 16))), limits())
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 1))
    shell.turn((request(1, prompt=16, block_hashes=HASHES), 1), num_results=1)
    view = shell.engine.view
    (waiting,) = view.waiting
    assert (view.num_free_blocks, view.cached_tokens(waiting), view.chunk_blocks(waiting, 4)) == (64, 12, 4)


def test_a_recomputed_prefix_is_shared_again():
    script = Script().then(prefill((0, 16)), preempt(0), prefill((1, 19)))
    shell = Shell(script, limits(num_blocks=5))
    shell.turn((request(0, prompt=16, block_hashes=HASHES), 9), (request(1, prompt=19), 1))
    shell.turn(num_results=1)  # the second evicts all that the first one left
    script.then(prefill((0, 17)))
    shell.turn(num_results=1)
    shell.turn((request(2, prompt=16, block_hashes=HASHES), 9))
    view = shell.engine.view
    assert [view.cached_tokens(sequence) for sequence in view.waiting] == [12]


def test_plans_know_how_much_their_decodes_have_in_common():
    shell = Shell("sarathi", limits(max_in_flight=1))
    said = [shell.turn((request(0, prompt=16, block_hashes=HASHES), 9))]
    said += [shell.turn(num_results=1)]  # its four blocks can be found from here on
    others = [(request(key, prompt=20, block_hashes=(*HASHES, key)), 3) for key in (11, 12)]
    said += [shell.turn(*others, num_results=1)]
    said += [shell.turn(num_results=1) for _ in range(6)]
    shell.drain()
    found = [(plan.num_decode_tokens, plan.decode_repeats, plan.common_context) for turn in said for plan in turn.plans]
    # Four blocks of four tokens, which two more sequences hold: who decodes alone has them to itself.
    assert found[:4] == [(0, 0, 0), (1, 0, 0), (1, 0, 0), (3, 32, 16)]
    assert found[-1] == (1, 0, 0)


def decode_plans(shell, num_turns):
    turns = [shell.turn(num_results=1) for _ in range(num_turns)]
    return [plan for turn in turns for plan in turn.plans if plan.num_decode_tokens]


def test_decodes_are_not_told_of_more_in_common_than_they_attend_to():
    shell = Shell("sarathi:token_budget=2048", limits(num_blocks=400, max_in_flight=1, max_num_seqs=8))
    document = tuple(range(100, 300))
    shell.turn((request(0, prompt=804, block_hashes=document), 1))
    shell.turn(num_results=1)
    shell.turn(*((request(key, prompt=9), 30) for key in (1, 2)))
    others = [(request(key, prompt=804, block_hashes=document), 9) for key in (3, 4, 5)]
    shell.turn(*others, num_results=1)
    some, *all_of_them = decode_plans(shell, 2)
    shell.drain()
    # Three of five decode, one of them with the document. With nothing looked up, two thirds of what they have repeat.
    assert (some.num_decode_tokens, some.common_context) == (3, 800)
    assert some.decode_repeats == some.decode_context * 2 // 3 < 800
    assert [(plan.num_decode_tokens, plan.decode_repeats) for plan in all_of_them] == [(5, 1600)]


def test_who_has_ended_on_the_road_still_holds_what_is_in_common():
    shell = Shell("sarathi:token_budget=4096", limits(num_blocks=400, max_in_flight=2))
    document = tuple(range(100, 140))
    shell.turn((request(0, prompt=164, block_hashes=document), 20))
    shell.turn(num_results=1)
    others = [(request(key, prompt=164, block_hashes=document), 20) for key in range(1, 6)]
    shell.turn(*others, num_results=1)
    decode_plans(shell, 2)
    turn = shell.turn(aborts=[1, 2, 3, 4], num_results=1)
    (plan,) = turn.plans
    assert plan.num_decode_tokens == 2
    assert plan.decode_repeats == plan.common_context == 160  # of two, one repeats it; four have gone, and hold it yet
    shell.drain()
