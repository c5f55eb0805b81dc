"""Steps made by hand: a `Mix` says what a step holds, `StepMaker` writes the messages that have workers compute it.

No sequence is ever prefilled: one with a cache comes as after a hit in the prefix cache, with its last token still to
compute. Its keys are whatever lies in the blocks that it is given.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from math import exp, fsum
from statistics import NormalDist
from typing import TYPE_CHECKING

from gllm.runtime.messages import Admission, ChunkWork, Step
from gllm.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.core import Limits

MAX_REPEATS = 9
"""The most steps of one mix in a row."""

DRIFT = MAX_REPEATS // 2
"""How far a decode's context gets from its mix's, either way: it grows by a token from step to step."""

_MANY_TOKENS = 1 << 18  # that are drawn, to begin prompts at
_SPREAD = 0.8  # of contexts: as of the prompts in Azure's traces of conversations
_LEAST_SPREAD = 1e-3

_PARAMS = SamplingParams(temperature=0.6, ignore_eos=True, detokenize=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What a step holds: chunks of prompts and decodes, one sequence each."""

    chunks: tuple[tuple[int, int], ...] = ()  # (start, tokens)
    contexts: tuple[int, ...] = ()  # of the decodes: tokens that each attends to, its new one included
    num_final: int = 0  # chunks that end their prompts, the last ones

    @property
    def num_tokens(self) -> int:
        """Tokens that pass the layers."""
        return len(self.contexts) + sum(num_tokens for _, num_tokens in self.chunks)

    @property
    def num_sequences(self) -> int:
        """Slots that it takes."""
        return len(self.contexts) + len(self.chunks)

    @property
    def num_sampled(self) -> int:
        """Rows that pass the head."""
        return len(self.contexts) + self.num_final

    @property
    def ends(self) -> tuple[int, ...]:
        """The most tokens that each sequence has in the cache, decodes first, while the mix is repeated."""
        return (*(context + DRIFT for context in self.contexts), *(start + num for start, num in self.chunks))


def decodes(num: int, context: int) -> Mix:
    """`num` sequences that decode, each with that context."""
    return Mix(contexts=(context,) * num)


def uneven_decodes(num: int, context: int, longest: int) -> Mix:
    """`num` sequences that decode, their contexts as unlike as in traffic.

    These are quantiles of a log-normal distribution with this mean, in no order; less unlike where one would be
    longer than `longest`.
    """
    scores, spread = [NormalDist().inv_cdf((number + 0.5) / num) for number in range(num)], _SPREAD
    while True:
        weights = [exp(spread * score) for score in scores]
        contexts = [int(weight * context * num / fsum(weights)) for weight in weights]
        if contexts[-1] < longest or spread < _LEAST_SPREAD:
            break
        spread /= 2
    for number in range(num * context - sum(contexts)):
        contexts[number % num] += 1
    random.Random(0).shuffle(contexts)
    return Mix(contexts=tuple(contexts))


def chunks(num: int, start: int, num_tokens: int) -> Mix:
    """`num` equal chunks, no prompt's last."""
    return Mix(chunks=((start, num_tokens),) * num)


def prompts(num_tokens: int, size: int) -> Mix:
    """So many tokens in chunks of `size` from position 0; the last one is shorter where it does not divide."""
    num_whole, rest = divmod(num_tokens, size)
    return Mix(chunks=((0, size),) * num_whole + ((0, rest),) * bool(rest))


def beside_chunk(mix: Mix, num_tokens: int) -> Mix:
    """The same decodes, and one chunk of so many tokens from position 0."""
    return replace(mix, chunks=((0, num_tokens),))


class StepMaker:
    """Writes steps for workers that nobody else sends any.

    Args:
        limits: of the engine.
        vocab_size: tokens are drawn from; which ones decides where experts are sent.
        max_tokens: the most of one step.
        first_plan: number of the first step; workers count on.
    """

    def __init__(self, limits: Limits, vocab_size: int, *, max_tokens: int, first_plan: int) -> None:
        self._limits, self._max_tokens, self._plan = limits, max_tokens, first_plan
        self._blocks_in_turn = random.Random(0).sample(range(limits.num_blocks), limits.num_blocks)
        self._next_block = 0
        longest = limits.max_tokens_per_sequence
        self._tokens = random.Random(0).choices(range(vocab_size), k=longest + _MANY_TOKENS)
        self._next_token = 0

    def make(self, mix: Mix, num_steps: int) -> tuple[list[Step], list[Step]]:
        """Steps that give a mix's sequences their caches, and then the mix `num_steps` times.

        The contexts of the decodes are the mix's in the middle of an odd number of steps. Blocks are the next ones of
        the cache in an order without order, as traffic leaves it; distinct for the sequences of a mix that fits.
        """
        assert num_steps <= MAX_REPEATS
        first = num_steps // 2
        tables = [self._blocks(-(-end // self._limits.block_size)) for end in mix.ends]
        cached = [*(context - first - 1 for context in mix.contexts), *(start for start, _ in mix.chunks)]
        before = self._before(cached, tables, mix)
        return before, [self._step(mix, tables, number) for number in range(num_steps)]

    def _before(self, cached: Sequence[int], tables: list[list[int]], mix: Mix) -> list[Step]:
        """Steps that compute the last cached token of every sequence that has one."""
        slots = [slot for slot, num in enumerate(cached) if num]
        steps = []
        for start in range(0, len(slots), self._max_tokens):
            part = slots[start : start + self._max_tokens]
            admissions = [self._admission(slot, mix.ends[slot]) for slot in part]
            work = [ChunkWork(slot, cached[slot] - 1, 1, final=True, blocks=tables[slot]) for slot in part]
            steps.append(Step(self._number(), admissions, work, 0, b"", [], -1))
        return steps

    def _step(self, mix: Mix, tables: list[list[int]], number: int) -> Step:
        """The mix once more; prompts that start do so anew, as others would in their place."""
        num_decodes, num_chunks = len(mix.contexts), len(mix.chunks)
        admissions, work = [], []
        for index, (start, num_tokens) in enumerate(mix.chunks):
            slot, final = num_decodes + index, index >= num_chunks - mix.num_final
            if start == 0:
                admissions.append(self._admission(slot, num_tokens))
            work.append(ChunkWork(slot, start, num_tokens, final, [] if start else tables[slot]))
        slots = array("i", range(num_decodes)).tobytes()
        # Nothing is waited for but room: workers take in by themselves what was sampled a pipeline's length ago.
        return Step(self._number(), admissions, work, num_decodes, slots, self._grown(tables, num_decodes, number), -1)

    def _grown(self, tables: list[list[int]], num_decodes: int, number: int) -> list[tuple[int, int]]:
        """One block more for some decodes, as if lengths differed; it is never reached."""
        block_size = self._limits.block_size
        width = -(-self._limits.max_model_len // block_size)
        slots = range(number, num_decodes, block_size) if number < block_size else ()
        return [(slot, tables[slot][0]) for slot in slots if len(tables[slot]) < width]

    def _admission(self, slot: int, num_tokens: int) -> Admission:
        # Others for each: what a GPU draws, and with it its clock, depends on how unlike the numbers are.
        start, self._next_token = self._next_token, (self._next_token + num_tokens) % _MANY_TOKENS
        tokens = self._tokens[start : start + num_tokens]
        return Admission(slot, tokens, num_tokens, _PARAMS, slot, [])

    def _blocks(self, num: int) -> list[int]:
        in_turn, start = self._blocks_in_turn, self._next_block
        self._next_block = (start + num) % len(in_turn)
        return [in_turn[(start + index) % len(in_turn)] for index in range(num)]

    def _number(self) -> int:
        self._plan += 1
        return self._plan - 1
