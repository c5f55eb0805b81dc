"""Token throttling against cases worked out by hand (arXiv 2504.14775, section 3.1)."""

import pytest
from core.driving import Shell, limits, play, request

from gllm.core import Scheduled, Wait, WaitReason
from gllm.policy import Throttle

PAPER = Throttle()
WT, UT, NEITHER = Throttle(ut=False), Throttle(wt=False), Throttle(wt=False, ut=False)


def test_the_papers_defaults():
    assert (PAPER.iterations, PAPER.max_prefill, PAPER.min_prefill, PAPER.kv_threshold) == (8, 2048, 32, 0.05)


def test_the_worked_example():
    assert PAPER.prefill_tokens(6144, 0.60) == 768  # 6144 / 8, below 2048 * 0.55 / 0.95 = 1185
    assert PAPER.decode_tokens(96, depth=4, turn=0) == 24


@pytest.mark.parametrize(
    ("waiting", "kv_free", "tokens"),
    [
        (16384, 1.0, 2048),  # 2048 by both
        (1 << 20, 1.0, 2048),  # MaxP
        (16384, 0.60, 1185),  # 2048 * 0.55 / 0.95 = 1185.7
        (16384, 0.24, 409),  # 2048 * 0.19 / 0.95 = 409.6
        (1000, 0.60, 125),  # 1000 / 8
        (1000, 0.10, 107),  # 2048 * 0.05 / 0.95 = 107.8
        (100, 0.60, 32),  # 12.5 below MinP
        (16384, 0.06, 32),  # 21.6 below MinP
        (16384, 0.05, 32),  # just not suspended
        (16384, 0.049, 0),  # suspended
        (1, 0.0, 0),
    ],
)
def test_both(waiting, kv_free, tokens):
    assert PAPER.prefill_tokens(waiting, kv_free) == tokens


@pytest.mark.parametrize(
    ("waiting", "tokens"), [(6144, 768), (100, 32), (256, 32), (264, 33), (16384, 2048), (20000, 2048), (6151, 768)]
)
@pytest.mark.parametrize("kv_free", [0.0, 0.04, 1.0])
def test_by_waiting_tokens_alone(waiting, tokens, kv_free):
    assert WT.prefill_tokens(waiting, kv_free) == tokens


@pytest.mark.parametrize(("kv_free", "tokens"), [(1.0, 2048), (0.60, 1228), (0.05, 102), (0.01, 32), (0.0, 32)])
@pytest.mark.parametrize("waiting", [1, 1 << 20])
def test_by_utilisation_alone(kv_free, tokens, waiting):
    assert UT.prefill_tokens(waiting, kv_free) == tokens


@pytest.mark.parametrize("kv_free", [0.0, 1.0])
def test_by_neither(kv_free):
    assert NEITHER.prefill_tokens(1, kv_free) == 2048


@pytest.mark.parametrize("policy", [PAPER, UT], ids=["both", "UT"])
def test_min_prefill_wins_over_utilisation(policy):
    assert policy.prefill_tokens(1 << 20, 0.051) >= policy.min_prefill


def test_a_threshold_of_zero_never_suspends():
    assert Throttle(kv_threshold=0).prefill_tokens(6144, 0.0) == 32


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_decoding", [8, 9, 23, 96, 97])
def test_one_round_of_the_pipeline_steps_each_once(num_decoding, depth):
    for first in range(depth):
        turns = range(first, first + depth)
        assert sum(PAPER.decode_tokens(num_decoding, depth, turn) for turn in turns) == num_decoding


def test_the_remainder_goes_round():
    steps = [PAPER.decode_tokens(5, depth=4, turn=turn) for turn in range(8)]
    assert sorted(steps[:4]) == sorted(steps[4:]) == [1, 1, 1, 2]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("num_decoding", [1, 2, 3])
def test_never_nothing_while_something_decodes(num_decoding, turn):
    assert PAPER.decode_tokens(num_decoding, depth=4, turn=turn) == 1


def test_nothing_while_nothing_decodes():
    assert [PAPER.decode_tokens(0, depth=4, turn=turn) for turn in range(4)] == [0, 0, 0, 0]


def test_without_the_split_all_decode_at_once():
    assert Throttle(split_decode=False).decode_tokens(96, depth=4, turn=1) == 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"min_prefill": 0}, "min_prefill is 0"),
        ({"min_prefill": 65, "max_prefill": 64}, "min_prefill is 65 and max_prefill 64"),
        ({"kv_threshold": 1.0}, "kv_threshold is 1.0"),
        ({"kv_threshold": -0.1}, "kv_threshold is -0.1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Throttle(**changes)


def test_a_micro_batch_gets_an_eighth_of_what_waits():
    shell = Shell("throttle:min_prefill=1", limits(num_blocks=1000))
    (plan,) = shell.turn(*((request(key, prompt=100), 9) for key in range(8))).plans
    assert plan.num_prefill_tokens == 100


def test_decodes_spread_over_the_pipeline():
    shell = Shell("throttle:wt=false", limits(depth=4, num_blocks=1000))
    shell.turn(*((request(key), 99) for key in range(8)))
    plans = [plan for _ in range(8) for plan in shell.turn(num_results=1).plans]
    assert [plan.num_decode_tokens for plan in plans[-4:]] == [2, 2, 2, 2]


def test_prompts_do_not_take_from_decodes():
    shell = Shell("throttle:max_prefill=8,min_prefill=8", limits())
    shell.turn((request(0), 99), (request(1), 99))
    (plan,) = shell.turn((request(2, prompt=20), 99), num_results=1).plans
    assert (plan.num_prefill_tokens, plan.num_decode_tokens) == (8, 2)


def crowded(kv_threshold):
    """A cache of ten blocks, seven of them held by a sequence that decodes; a second prompt comes."""
    shell = Shell(f"throttle:kv_threshold={kv_threshold}", limits(num_blocks=10))
    shell.turn((request(0, prompt=26, max_tokens=5), 99))
    return shell, shell.turn((request(1), 99), num_results=1)


def test_prefill_is_suspended_below_the_threshold():
    _, turn = crowded(0.31)
    assert not any(type(event) is Scheduled for event in turn.events)


def test_prefill_is_not_suspended_at_the_threshold():
    _, turn = crowded(0.29)
    assert any(type(event) is Scheduled for event in turn.events)


def test_a_suspended_prompt_is_served_in_the_end():
    shell, _ = crowded(0.31)
    shell.drain()
    assert shell.ledger.ended[1].reason == "length"


def test_suspension_gives_way_when_nothing_decodes():
    shell = Shell("throttle:kv_threshold=0.9,max_prefill=32", limits(num_blocks=20))
    play(shell, [(request(0, prompt=70), 1)])
    assert shell.ledger.ended[0].reason == "stop"


def test_a_suspended_prompt_waits_for_the_cache():
    shell = Shell("throttle:kv_threshold=0.31", limits(num_blocks=10, depth=2))
    shell.turn((request(0, prompt=26), 99))
    turn = shell.turn((request(1), 99), num_results=1)
    assert turn.wait == Wait(WaitReason.CACHE_FULL)


def test_the_most_tokens_of_a_micro_batch():
    assert PAPER.max_batch_tokens(limits(max_num_seqs=100)) == 2148
