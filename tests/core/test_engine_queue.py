"""The waiting queue is always sorted, whoever comes, goes, or comes back."""

from core.driving import limits, request
from core.scripted import Script, preempt, prefill
from hypothesis import given
from hypothesis import strategies as st

from gllm.core import Engine, StepResult
from gllm.policy import Priority


class ByPriority(Script):
    order = Priority()


def waiting(engine):
    return [sequence.id for sequence in engine.view.waiting]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, 3)), max_size=60))
def test_any_arrivals_and_aborts(actions):
    engine = Engine(ByPriority(), limits())
    model = {}
    for key, (arrives, where, priority) in enumerate(actions):
        if arrives or not model:
            model[key] = (priority, key)
            engine.turn(requests=[request(key, priority=priority)], now=key)
        else:
            gone = sorted(model)[where % len(model)]
            del model[gone]
            engine.turn(aborts=[gone], now=key)
        assert waiting(engine) == sorted(model, key=model.get)
        assert engine.view.num_waiting == len(model)


@given(st.lists(st.integers(0, 7), unique=True, max_size=5), st.lists(st.integers(0, 7), max_size=5))
def test_those_preempted_come_back_to_their_places(admitted, aborted):
    engine = Engine(ByPriority(), limits())
    engine.turn(requests=[request(key, arrival_ns=0) for key in range(8)], now=0)
    if admitted:
        engine.policy.then(prefill(*((key, 4) for key in admitted)))
        engine.turn(now=1)
        engine.policy.then(preempt(*admitted))
        engine.turn([StepResult(0)], now=2)
    engine.turn(aborts=aborted, now=3)
    assert waiting(engine) == sorted(set(range(8)) - set(aborted))
    engine.check_invariants()
