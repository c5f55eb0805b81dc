"""Preemption takes the cache and nothing else."""

import pytest
from core.driving import Shell, limits, play, request
from core.scripted import Script, decode, preempt, prefill

from gllm.core import Finished, FirstToken, Preempted, Rejected, Scheduled


def decoding(*steps, num_steps=3, **changes):
    """Sequence 0, prompt 4, has `num_steps` tokens back; then the policy takes the steps."""
    script = Script().then(prefill((0, 4)), *[decode(1)] * (num_steps - 1))
    shell = Shell(script, limits(**changes))
    shell.turn((request(0), 5))
    for _ in range(num_steps - 1):
        shell.turn(num_results=1)
    shell.turn(num_results=1)
    script.then(*steps)
    return shell


def test_it_frees_the_cache_and_queues_again():
    shell = decoding(preempt(0))
    assert shell.turn().events == [Preempted(0)]
    view = shell.engine.view
    assert (view.num_free_blocks, view.num_waiting, view.num_running, view.num_decoding) == (64, 1, 0, 0)


def test_prompt_and_outputs_are_computed_again():
    shell = decoding(preempt(0), prefill((0, 7)))
    (plan,) = shell.turn().plans
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.num_tokens, chunk.final) == (0, 7, True)
    assert plan.preempted == [0]


def test_recomputing_may_be_cut_into_chunks():
    shell = decoding(preempt(0), prefill((0, 5)), prefill((0, 2)), depth=2)
    assert [plan.num_sampled for plan in shell.turn().plans] == [0, 1]


def test_no_token_is_lost_and_none_is_first_twice():
    shell = decoding(preempt(0), prefill((0, 7)), decode(1))
    shell.turn()
    assert shell.turn(num_results=1).events == []
    assert shell.turn(num_results=1).events == [Finished(0, "stop", 5)]


def test_a_recomputed_sequence_is_not_scheduled_again():
    shell = decoding(preempt(0), prefill((0, 7)))
    assert shell.turn().events == [Preempted(0)]


def test_a_recomputation_that_reaches_the_limit_ends():
    shell = decoding(preempt(0), prefill((0, 7)), max_model_len=8)
    shell.turn()
    assert shell.turn(num_results=1).events == [Finished(0, "length", 4)]


def test_an_abort_while_preempted_keeps_the_count():
    shell = decoding(preempt(0))
    shell.turn()
    assert shell.turn(aborts=[0]).events == [Finished(0, "abort", 3)]


def test_preempted_twice():
    shell = decoding(preempt(0), prefill((0, 7)), preempt(0), prefill((0, 8)))
    shell.turn()
    assert shell.turn(num_results=1).plans[0].num_prefill_tokens == 8
    assert shell.turn(num_results=1).events == [Finished(0, "stop", 5)]


def test_preempted_again_with_its_prompt_half_done():
    shell = decoding(preempt(0), prefill((0, 5)), preempt(0), prefill((0, 7)))
    shell.turn()
    assert shell.turn(num_results=1).plans[0].num_prefill_tokens == 7
    assert shell.turn(num_results=1).events == []


def test_a_half_done_prompt_starts_over():
    shell = Shell(Script().then(prefill((0, 4)), preempt(0), prefill((0, 8))), limits())
    shell.turn((request(0, prompt=8), 1))
    shell.turn(num_results=1)
    assert shell.turn(num_results=1).events == [FirstToken(0), Finished(0, "stop", 1)]


def test_it_queues_before_those_that_arrived_later():
    shell = decoding(preempt(0))
    shell.turn((request(1), 1))
    assert [sequence.id for sequence in shell.engine.view.waiting] == [0, 1]


def test_a_preemption_without_a_plan_is_named_by_the_next_plan():
    shell = decoding(preempt(0))
    shell.turn()
    shell.engine.policy.then(prefill((0, 7)))
    assert shell.turn().plans[0].preempted == [0]


@pytest.mark.parametrize("spec", ["throttle", "sarathi", "prefill_first"])
def test_a_cache_too_small_for_two_still_serves_both(spec):
    shell = Shell(spec, limits(num_blocks=4))
    events, _ = play(shell, [(request(0), 10), (request(1), 10)])
    assert {event.id for event in events if type(event) is Preempted} == {1}
    assert [event for event in events if type(event) in (Finished, Rejected)] == [
        Finished(0, "stop", 10),
        Finished(1, "stop", 10),
    ]
    assert events.count(Scheduled(1, 0)) == 1
