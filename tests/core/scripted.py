"""A policy that does as it is told, and a description of an engine's state to compare before and after."""

from __future__ import annotations

from collections import deque
from itertools import chain

from gllm.core import Batch, Preempt, Wait, WaitReason
from gllm.policy import Fcfs

FAR = 1 << 60
MEMOS = {"hits", "hits_version", "num_evictable_hits"}  # what a sequence remembers of its last look into the cache


class Script:
    """Says what the steps say, one at a time; then waits."""

    order = Fcfs()

    def __init__(self, max_tokens=1000):
        self.steps = deque()
        self.num_asked = 0
        self.max_tokens = max_tokens

    def then(self, *steps):
        self.steps.extend(steps)
        return self

    def decide(self, view):
        self.num_asked += 1
        return self.steps.popleft()(view) if self.steps else Wait(WaitReason.HELD, until_ns=FAR)

    def max_batch_tokens(self, _):
        return self.max_tokens


def find(view, key):
    return next(sequence for sequence in chain(view.waiting, view.running) if sequence.id == key)


def prefill(*chunks, decode=0):
    """A step that plans (id, tokens) chunks and counted decodes."""
    return lambda view: Batch([(find(view, key), count) for key, count in chunks], decode)


def decode(count):
    return lambda _: Batch(num_decode=count)


def decode_named(*keys):
    return lambda view: Batch(decode=[find(view, key) for key in keys])


def preempt(*keys):
    return lambda view: Preempt([find(view, key) for key in keys])


def describe(thing, seen=None):
    """Plain nested values of everything reachable, memos of cache look-ups left out."""
    seen = {} if seen is None else seen
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if id(thing) in seen:
        return f"see {seen[id(thing)]}"
    seen[id(thing)] = len(seen)
    if isinstance(thing, dict):
        return [(describe(key, seen), describe(value, seen)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple, deque)):
        return [describe(item, seen) for item in thing]
    if not type(thing).__module__.startswith("gllm"):
        return repr(thing)
    names = [*getattr(type(thing), "__slots__", ()), *getattr(thing, "__dict__", ())]
    return [(name, describe(getattr(thing, name), seen)) for name in names if name not in MEMOS]
