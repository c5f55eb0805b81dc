"""Each way in which a policy can err: a `PlanError`, and nothing has changed."""

import pytest
from core.driving import limits, request
from core.scripted import Script, describe, find

from gllm.core import Batch, Engine, PlanError, Preempt, StepResult


class Scene:
    """Sequences in every phase, a cache of eight blocks of four tokens, and room for one more micro-batch.

    0 and 1 are ready to decode, each about to enter a new block; 2 has half its prompt; 3 is on the
    road; 4 to 6 wait, the last with a prompt of 24 tokens; 7 has ended.
    """

    def __init__(self):
        self.script = Script(max_tokens=20)
        self.engine = Engine(self.script, limits(num_blocks=8, max_num_seqs=5, depth=2))
        prompts = {0: 4, 1: 4, 2: 8, 3: 4, 4: 4, 5: 4, 6: 24, 7: 4}
        self.engine.turn(requests=[request(key, prompt=prompt) for key, prompt in prompts.items()], now=1)
        self.view = self.engine.view
        self.by_id = {sequence.id: sequence for sequence in self.view.waiting}
        self.turn(Batch([(self[key], 4) for key in (0, 1, 2)]))
        self.turn(results=[StepResult(0)], aborts=[7])
        self.turn(Batch([(self[3], 4)]))

    def __getitem__(self, key):
        return self.by_id[key]

    def turn(self, *decisions, **options):
        self.script.then(*[lambda _, decision=decision: decision for decision in decisions])
        return self.engine.turn(now=2, **options)


WAYS = {
    "more decodes than are ready": (lambda _: Batch(num_decode=3), "3 decode steps asked for, 2 sequences are ready"),
    "less than no decodes": (lambda _: Batch(num_decode=-1), "-1 decode steps"),
    "nothing": (lambda _: Batch(), "an empty batch"),
    "named and counted": (lambda s: Batch(num_decode=1, decode=[s[0]]), "counts decode steps or names them, not both"),
    "a decode of who waits": (lambda s: Batch(decode=[s[4]]), r"Sequence\(4, waiting, 4 tokens\) is not ready"),
    "a decode of a half-done prompt": (lambda s: Batch(decode=[s[2]]), "is not ready"),
    "a decode of who is on the road": (lambda s: Batch(decode=[s[0], s[3]]), "is not ready"),
    "a decode of who ended": (lambda s: Batch(decode=[s[7]]), "is not ready"),
    "a decode named twice": (lambda s: Batch(decode=[s[0], s[0]]), "a sequence is named twice"),
    "a chunk of who decodes": (lambda s: Batch([(s[0], 1)]), "has no prompt left"),
    "a chunk of who is on the road": (lambda s: Batch([(s[3], 1)]), "has no prompt left"),
    "a chunk of who ended": (lambda s: Batch([(s[7], 4)]), "has no prompt left"),
    "a chunk of no tokens": (lambda s: Batch([(s[4], 0)]), "0 tokens asked for"),
    "a chunk beyond the prompt": (lambda s: Batch([(s[4], 5)]), "5 tokens asked for .*, 4 are left"),
    "a chunk beyond what is left": (lambda s: Batch([(s[2], 5)]), "5 tokens asked for .*, 4 are left"),
    "two chunks of one prompt": (lambda s: Batch([(s[2], 1), (s[2], 1)]), "a sequence is named twice"),
    "one good chunk and a bad one": (lambda s: Batch([(s[4], 4), (s[5], 9)]), "9 tokens asked for"),
    "too many admissions": (lambda s: Batch([(s[4], 4), (s[5], 4)]), "2 more sequences would exceed max_num_seqs=5"),
    "more tokens than promised": (
        lambda s: Batch([(s[6], 21)]),
        "21 tokens in one batch, the policy promised at most 20",
    ),
    "more prompt than the cache": (lambda s: Batch([(s[6], 20)]), "the batch needs 5 cache blocks, 4 are free"),
    "a prompt beside decodes": (lambda s: Batch([(s[6], 12)], num_decode=2), "needs 5 cache blocks, 4 are free"),
    "a prompt beside named decodes": (lambda s: Batch([(s[6], 12)], decode=[s[1], s[0]]), "needs 5 cache blocks"),
    "preempting nobody": (lambda _: Preempt([]), "names at least one sequence"),
    "preempting twice": (lambda s: Preempt([s[0], s[0]]), "and none twice"),
    "preempting who waits": (lambda s: Preempt([s[4]]), "holds no cache to preempt"),
    "preempting who ended": (lambda s: Preempt([s[7]]), "holds no cache to preempt"),
    "preempting who is on the road": (lambda s: Preempt([s[0], s[3]]), "is on the road; only idle"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_policy_is_told_and_nothing_has_changed(way):
    decide, message = WAYS[way]
    scene = Scene()
    before = describe(scene.view)
    with pytest.raises(PlanError, match=message):
        scene.turn(decide(scene))
    assert describe(scene.view) == before
    scene.engine.check_invariants()


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_goes_on_as_if_it_had_not_been_asked(way):
    scene, other = Scene(), Scene()
    with pytest.raises(PlanError):
        scene.turn(WAYS[way][0](scene))
    for each in (scene, other):
        each.turn(Batch([(each[2], 4), (each[4], 4)], num_decode=2))
    assert describe(scene.view) == describe(other.view)


def test_what_just_fits_is_no_error():
    scene = Scene()
    (plan,) = scene.turn(Batch([(scene[6], 8)], decode=[scene[0], scene[1]])).plans
    assert plan.num_free_blocks == 0


def test_decodes_that_need_no_block_fit_a_full_cache():
    scene = Scene()
    scene.turn(Batch([(scene[6], 8)], num_decode=2))
    scene.turn(results=[StepResult(1), StepResult(2)])
    assert scene.view.num_free_blocks == 0
    (plan,) = scene.turn(Batch(decode=[scene[0]])).plans
    assert (plan.num_decode_tokens, plan.grown) == (1, ())


def test_find_knows_where_to_look():
    scene = Scene()
    assert [find(scene.view, key) for key in (0, 4)] == [scene[0], scene[4]]
