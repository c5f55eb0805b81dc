"""Which steps are measured: the points of every table, and the mixes that they are taken from."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from gllm.runtime.profile.steps import DRIFT, Mix, chunks, decodes, eager, mixed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.core import Limits

BASE_CHUNK = 64
MOST_EACH = 16
"""Equal chunks of one step, at most."""

_BEYOND_STEP = 128  # between decode batches beyond the largest graph
_CONTEXTS = (16, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_QUERIES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_STARTS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_QUICK_CONTEXTS = (16, 1024)
_QUICK_QUERIES = (1, 256, 2048)
_QUICK_STARTS = (0, 1024)
_LONGEST_CHECK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a step may hold."""

    limits: Limits
    max_tokens: int
    graph_sizes: tuple[int, ...] = ()  # of decode batches; none where nothing is captured

    def fits(self, mix: Mix) -> bool:
        """Whether a mix can be computed without sequences that share blocks."""
        limits = self.limits
        num_blocks = sum(-(-end // limits.block_size) for end in mix.ends)
        return (
            mix.num_sequences <= limits.max_num_seqs
            and mix.num_tokens <= self.max_tokens
            and max(mix.ends) <= limits.max_tokens_per_sequence
            and num_blocks <= limits.num_blocks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Points of all tables, increasing; `checks` are for none of them."""

    room: Room
    decode_batches: tuple[int, ...]
    batches: tuple[int, ...]  # of decode attention
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    mixed_batches: tuple[int, ...]
    queries: tuple[int, ...]
    starts: tuple[int, ...]
    transfer_tokens: tuple[int, ...]  # none with one stage
    checks: tuple[Mix, ...]

    def decode(self, num: int) -> Mix:
        """The step behind `decode`: at the smallest context."""
        return decodes(num, self.contexts[0])

    def mixed(self, num: int) -> Mix:
        """The step behind `mixed`."""
        return mixed(num, self.contexts[0], BASE_CHUNK)

    def num_each(self, num_tokens: int, start: int) -> int:
        """How many such chunks a step can hold, 16 at most; 0: not one."""
        fitting = (num for num in range(MOST_EACH, 0, -1) if self.room.fits(chunks(num, start, num_tokens)))
        return next(fitting, 0)

    def mixes(self) -> list[Mix]:
        """All that is measured in flight, each once."""
        found = [
            *(eager(num, BASE_CHUNK) for num in self.tokens),
            *(self.decode(num) for num in self.decode_batches),
            *(decodes(num, context) for num, context in product(self.batches, self.contexts)),
            *(self.mixed(num) for num in self.mixed_batches),
            *(chunks(1, start, num) for num, start in product(self.queries, self.starts)),
            *(chunks(self.num_each(num, start), start, num) for num, start in product(self.queries, self.starts)),
            *self.checks,
        ]
        return [mix for mix in dict.fromkeys(found) if mix.num_tokens and self.room.fits(mix)]


def make_grid(room: Room, *, quick: bool = False) -> Grid:
    """All points that there is room for; with `quick`, few of them.

    Raises:
        ValueError: There is room for none.
    """
    if not room.fits(eager(2 * BASE_CHUNK, BASE_CHUNK)):
        raise ValueError(
            f"a profile needs steps of two prompts of {BASE_CHUNK} tokens; raise --max-tokens-per-step, "
            "--max-num-seqs, --max-model-len or the cache"
        )
    room = replace(room, max_tokens=_most_tokens(room))
    longest = room.limits.max_tokens_per_sequence
    contexts = _up_to(longest - DRIFT, _QUICK_CONTEXTS if quick else _CONTEXTS)
    tokens = tuple(_doublings(room.max_tokens, 4) if quick else _tokens(room.max_tokens))
    doublings = _doublings(room.limits.max_num_seqs, 8 if quick else 2)
    batches = tuple(num for num in doublings if room.fits(decodes(num, contexts[0])))
    captured = tuple(num for num in room.graph_sizes if room.fits(decodes(num, contexts[0])))
    queries = _up_to(min(longest, room.max_tokens), _QUICK_QUERIES if quick else _QUERIES)
    return Grid(
        room=room,
        decode_batches=captured + _beyond(captured, batches) if captured else batches,
        batches=batches,
        contexts=contexts,
        tokens=tokens,
        mixed_batches=_mixed_batches(room, contexts[0], batches),
        queries=queries,
        starts=_up_to(longest - queries[0], _QUICK_STARTS if quick else _STARTS),
        transfer_tokens=() if room.limits.depth == 1 else tuple(_doublings(room.max_tokens, 4 if quick else 2)),
        checks=random_mixes(room, num=6 if quick else 24, seed=0),
    )


def _up_to(most: int, points: Iterable[int]) -> tuple[int, ...]:
    return tuple(point for point in points if point <= most)


def _doublings(most: int, factor: int = 2) -> list[int]:
    """1, 2, 4, ... and `most`."""
    found = [1]
    while found[-1] * factor < most:
        found.append(found[-1] * factor)
    return [*found, most] if most > 1 else found


def _most_tokens(room: Room) -> int:
    """Of a step of base chunks, of which each takes a slot and blocks."""
    limits = room.limits
    num_chunks = min(limits.max_num_seqs, limits.num_blocks // -(-BASE_CHUNK // limits.block_size))
    return min(room.max_tokens, BASE_CHUNK * num_chunks)


def _tokens(most: int) -> list[int]:
    """Doublings to 64, every 64 to 1024, 128 to 2048, 256 to 8192, then a sixteenth and less."""
    found = _doublings(BASE_CHUNK)
    while found[-1] < most:
        by = BASE_CHUNK << max(0, (found[-1] // 1024).bit_length() - (found[-1] >= 4096))
        found.append(min(found[-1] + by, most))
    return found


def _beyond(captured: tuple[int, ...], batches: tuple[int, ...]) -> tuple[int, ...]:
    """Decode batches that no graph takes."""
    return tuple(range(captured[-1] + _BEYOND_STEP, batches[-1] + 1, _BEYOND_STEP))


def _mixed_batches(room: Room, context: int, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Decodes beside a base chunk; the last one fills the step or the slots."""
    most = min(room.limits.max_num_seqs - 1, room.max_tokens - BASE_CHUNK)
    points = dict.fromkeys([*_up_to(most, batches), most])
    return tuple(num for num in points if room.fits(mixed(num, context, BASE_CHUNK)))


def random_mixes(room: Room, *, num: int, seed: int) -> tuple[Mix, ...]:
    """Steps as traffic makes them: every third only decodes, the others hold chunks too."""
    generator = random.Random(seed)
    found: list[Mix] = []
    while len(found) < num:
        mix = _random_mix(room, generator, with_chunks=len(found) % 3 > 0)
        if mix.num_tokens and room.fits(mix):
            found.append(mix)
    return tuple(found)


def _random_mix(room: Room, generator: random.Random, *, with_chunks: bool) -> Mix:
    def draw(low: int, high: int) -> int:
        """Small numbers as often as large ones."""
        return min(int(low * (max(high, low) / low) ** generator.random()), max(high, low))

    longest = min(room.limits.max_tokens_per_sequence - DRIFT, _LONGEST_CHECK)
    pieces = []
    for _ in range(draw(1, 8) if with_chunks else 0):
        num_tokens = draw(1, min(room.max_tokens, longest))
        start = generator.randrange(longest - num_tokens + 1) if generator.random() < 0.5 else 0
        pieces.append((start, num_tokens))
    num_decodes = draw(1, room.limits.max_num_seqs)
    contexts = tuple(draw(_CONTEXTS[0], longest) for _ in range(num_decodes))
    return Mix(chunks=tuple(pieces), contexts=contexts, num_final=generator.randint(0, len(pieces)))
