"""The engine's process: what comes at the same time as the order to end is not forgotten."""

from __future__ import annotations

import threading
import time
from array import array
from types import SimpleNamespace

import pytest
import zmq

from gllm.runtime import client
from gllm.runtime.channels import Addresses, socket
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.default_model import PATH
from gllm.runtime.engine import __main__ as engine
from gllm.runtime.engine.task import EngineTask
from gllm.runtime.engine.workers import Workers
from gllm.runtime.messages import (
    Finish,
    NewRequest,
    Progress,
    Record,
    StageTime,
    StepDone,
    Submit,
    decode_notice,
    encode,
)
from gllm.runtime.sampling_params import SamplingParams

PATIENCE_S = 20.0


class OneWorker(Workers):
    """The engine's side of a worker that the test plays."""

    def __init__(self, config, context, address, _folder):  # its router is half of a pair; nobody is started
        self._config = config
        self.router, self.theirs = socket(context, zmq.PAIR, bind=address), socket(context, zmq.PAIR, connect=address)
        self.monitor = context.socket(zmq.PAIR)
        self.plans = []

    def load(self, _tell):
        return self._config.limits(64), "nothing"

    def order(self, order):
        if hasattr(order, "plan"):
            self.plans.append(order.plan)

    def check(self, *, disconnected):
        pass

    def end(self):
        pass

    def answer(self, plan):
        """What a worker says of a step of one token."""
        now = time.monotonic_ns()
        for report in (StageTime(plan, 0, now, now, now), StepDone(plan, array("i", [7]).tobytes(), None, None)):
            self.theirs.send_multipart((b"0", encode(report)))


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "Workers", OneWorker)
    config = RuntimeConfig(model=str(PATH), device="cpu", max_in_flight=2, record="")
    return engine.Server(EngineTask(config, str(tmp_path)))


def until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_step_that_comes_back_with_the_order_to_end_is_part_of_the_record(server, monkeypatch, tmp_path):
    """A request has ended, a step planned ahead is still out; its result and `Finish` are found by the same look."""
    looks, patience = threading.Event(), server._patience_ms
    looks.set()

    def look(loop):
        assert looks.wait(PATIENCE_S)
        return patience(loop)

    monkeypatch.setattr(server, "_patience_ms", look)
    addresses, context = Addresses.within(tmp_path), zmq.Context()
    commands = socket(context, zmq.PUSH, connect=addresses.commands)
    notices = socket(context, zmq.PULL, connect=addresses.notices)

    def heard():
        assert notices.poll(1000 * PATIENCE_S)
        return decode_notice(notices.recv())

    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    heard()  # Ready
    params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
    asked = NewRequest(0, [1, 2, 3], params, 0, time.monotonic_ns(), num_output_tokens=1)
    commands.send(encode(Submit([asked])))
    until(lambda: server.workers.plans == [0, 1])
    server.workers.answer(0)
    while not (isinstance(ended := heard(), Progress) and ended.deltas):
        pass
    assert ended.deltas[0].finish_reason == "stop"
    looks.clear()
    time.sleep(0.5)  # longer than a look: the next one finds both
    server.workers.answer(1)
    commands.send(encode(Finish()))
    time.sleep(0.2)
    looks.set()
    while not isinstance(record := heard(), Record):
        pass
    assert record.columns is not None
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("timeout_s", [0.0, 0.0004, 0.002, 0.0107, 0.35])
def test_a_time_out_is_kept_though_a_poll_is_late(timeout_s, monkeypatch):
    now_s = [100.0]

    def sleep(seconds):
        now_s[0] += seconds

    def poll(left_ms):
        sleep(left_ms / 1000 + 0.0013 * (left_ms > 0) + 1e-6)
        return False

    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep))
    waiting = object.__new__(client.EngineClient)
    waiting._engine, waiting._notices = SimpleNamespace(poll=lambda: None), SimpleNamespace(poll=poll)
    assert waiting.receive(timeout_s) is None
    assert timeout_s <= now_s[0] - 100.0 <= timeout_s + 0.0001
