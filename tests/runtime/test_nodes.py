"""Two launchers on loopback as two machines: they meet in any order, answer, and end together."""

import contextlib
import os
import signal
import time

import pytest
from runtime.servers import DEADLINE_S, SLACK_S, SOON_S, Command, InFlight, Serving, free_port, until

ALONE = {"prompt": "Sort: 5 3 9", "max_tokens": 12, "temperature": 0}


@contextlib.contextmanager
def two_nodes(*layout, first=0):
    """Node 0, which serves, and node 1; `first` begins a moment before the other."""
    common = ("--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", *layout)
    with contextlib.ExitStack() as stack:
        nodes = {first: stack.enter_context(Serving("--node-rank", first, *common))}
        time.sleep(1)
        nodes[1 - first] = stack.enter_context(Serving("--node-rank", 1 - first, *common))
        nodes[0].ready()
        yield nodes[0], nodes[1]


def assert_ended(node, status, *lines):
    assert node.ended() == (status, list(lines))
    assert node.left() == []


@pytest.mark.parametrize(("layout", "first"), [(("--pp", 2), 0), (("--tp", 2), 1)])
def test_two_nodes_answer_and_a_good_end_is_one_for_both(layout, first):
    with Serving() as alone:
        expected = alone.ready().post(**ALONE).json()["choices"]
    with two_nodes(*layout, first=first) as (serving, working):
        assert serving.post(**ALONE).json()["choices"] == expected
        serving.process.terminate()
        assert_ended(serving, 0)
        assert_ended(working, 0)


def test_a_worker_of_the_other_node_dies():
    with two_nodes("--pp", 2) as (serving, working):
        flying = InFlight(serving, stream=True)
        assert flying.begun.wait(DEADLINE_S)  # its stream, whose end is an event then
        start_s = time.monotonic()
        working.kill("worker")
        status, error = flying.error()
        assert (status, error["message"]) == (200, "the engine died: worker 1 died")
        assert flying.ended_s - start_s < SOON_S + SLACK_S
        assert_ended(serving, 1, "gllm: error: worker 1 died")
        assert_ended(working, 1, "gllm: error: worker 1 was killed by SIGKILL")


def test_node_0_dies():
    with two_nodes("--pp", 2) as (serving, working):
        os.kill(serving.process.pid, signal.SIGKILL)
        assert_ended(working, 1, "gllm: error: worker 1 has lost its engine, which has ended")
        assert serving.left() == []


def test_node_1_is_told_to_end():
    with two_nodes("--pp", 2) as (serving, working):
        working.interrupt()
        assert_ended(working, 130, "gllm: interrupted")
        assert_ended(serving, 1, "gllm: error: worker 1 died")


def test_a_node_that_waits_can_be_interrupted():
    endpoint = f"127.0.0.1:{free_port()}"
    with Command("serve", "--nnodes", 2, "--node-rank", 1, "--pp", 2, "--rdzv-endpoint", endpoint) as node:
        until(lambda: node.pids("launcher"))
        time.sleep(1)
        node.interrupt()
        assert_ended(node, 130, "gllm: interrupted")
