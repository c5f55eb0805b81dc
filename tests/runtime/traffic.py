"""Requests that come and go one by one while others run."""

from __future__ import annotations

import random


class _Caller:
    """Who asked for one request, and what it got."""

    def __init__(self):
        self.token_ids = []
        self.is_over = False

    def take(self, delta):
        assert not self.is_over, "news after the end"
        if isinstance(delta, Exception):
            raise delta
        self.token_ids += delta.token_ids
        self.is_over = delta.finish_reason is not None


def come_and_go(llm, prompts, params, *, leaving=(), seed=0):
    """Submit requests at random moments and abort those in `leaving` at random moments.

    Returns the tokens of each, those of the aborted ones as far as they came.
    """
    lots, generations = random.Random(seed), llm._generations
    callers = [_Caller() for _ in prompts]
    opened = [
        generations.prepare(prompt, each, caller.take)
        for prompt, each, caller in zip(prompts, params, callers, strict=True)
    ]
    to_come, there, gone = list(range(len(prompts))), set(), []
    while to_come or there:
        while to_come and (not there or lots.random() < 0.4):
            there.add(to_come[0])
            generations.submit(opened[to_come.pop(0)])
        for number in sorted(there & set(leaving)):
            if lots.random() < 0.05:
                generations.abort(opened[number])
                there.remove(number)
                gone.append(number)
        if there:
            llm._listen()
        there -= {number for number in there if callers[number].is_over}
    assert bool(leaving) == bool(gone), "nobody left in time"
    return [caller.token_ids for caller in callers]


def assert_undisturbed(answers, expected, *, leaving=()):
    """Who stayed got every token; who left got a beginning of what would have come."""
    for number, (answer, whole) in enumerate(zip(answers, expected, strict=True)):
        assert answer == (whole[: len(answer)] if number in leaving else whole), f"request {number}"
