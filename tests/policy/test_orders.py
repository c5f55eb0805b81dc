"""Who is admitted first."""

import pytest
from core.driving import Shell, limits, play, request

from gllm.core import Scheduled
from gllm.policy import ORDERS, LongestPrefix, Sarathi

REQUESTS = {
    "early": {"key": 0, "prompt": 9, "arrival_ns": 1, "priority": 2, "deadline_ns": None},
    "short": {"key": 1, "prompt": 2, "arrival_ns": 2, "priority": 1, "deadline_ns": 90},
    "urgent": {"key": 2, "prompt": 9, "arrival_ns": 3, "priority": 0, "deadline_ns": 80},
    "due": {"key": 3, "prompt": 5, "arrival_ns": 4, "priority": 1, "deadline_ns": 70},
    "late": {"key": 4, "prompt": 5, "arrival_ns": 5, "priority": 2, "deadline_ns": None},
}
EXPECTED = {
    "fcfs": "early short urgent due late",
    "priority": "urgent short due early late",
    "sjf": "short due late early urgent",
    "edf": "due urgent short early late",
    "lpm": "early short urgent due late",
}


def admitted(order, arrivals, warm=()):
    """Names in the order of admission, one at a time."""
    shell = Shell(Sarathi(order=order), limits(max_num_seqs=1))
    play(shell, warm)
    events, _ = play(shell, arrivals)
    return [event.id for event in events if type(event) is Scheduled]


def test_every_order_is_tested():
    assert EXPECTED.keys() == ORDERS.keys()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_admission(order, reverse):
    asked = [request(fields["key"], **{k: v for k, v in fields.items() if k != "key"}) for fields in REQUESTS.values()]
    arrivals = [(each, 1) for each in (reversed(asked) if reverse else asked)]
    names = list(REQUESTS)
    assert " ".join(names[key] for key in admitted(ORDERS[order], arrivals)) == EXPECTED[order]


@pytest.mark.parametrize("order", ORDERS)
def test_ties_go_by_id(order):
    arrivals = [(request(key, arrival_ns=0), 1) for key in (2, 0, 1)]
    assert admitted(ORDERS[order], arrivals) == [0, 1, 2]


WARM = [(request(100, prompt=12, block_hashes=(1, 2, 3)), 1)]


def known(key, num_blocks):
    """A request of whose prompt the cache holds so many blocks."""
    return request(key, prompt=16, block_hashes=[*(1, 2, 3)[:num_blocks], 10 * key + 7]), 1


def test_the_longest_cached_prefix_first():
    assert admitted(LongestPrefix(), [known(0, 0), known(1, 1), known(2, 3), known(3, 2)], WARM) == [2, 3, 1, 0]


def test_equally_long_prefixes_go_by_arrival():
    assert admitted(LongestPrefix(), [known(0, 2), known(1, 2), known(2, 2)], WARM) == [0, 1, 2]


def test_only_the_window_is_looked_at():
    assert admitted(LongestPrefix(window=2), [known(0, 0), known(1, 1), known(2, 3)], WARM)[0] == 1


def test_who_waits_behind_the_window_is_served_too():
    assert admitted(LongestPrefix(window=1), [known(0, 0), known(1, 1), known(2, 3)], WARM) == [0, 1, 2]


def test_behind_the_window_prompts_follow_in_one_batch():
    shell = Shell(Sarathi(order=LongestPrefix(window=2)), limits())
    (plan,) = shell.turn(*(known(key, 0) for key in range(4))).plans
    assert [chunk.sequence.id for chunk in plan.chunks] == [0, 1, 2, 3]
