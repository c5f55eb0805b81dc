"""Which steps are measured: the points of every table, and the mixes that they are taken from."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise, product
from typing import TYPE_CHECKING

from gllm.chunk_schedule import MOST_EACH
from gllm.graph_sizes import MAX_CHUNKS
from gllm.runtime.profile.steps import DRIFT, Mix, beside_chunk, chunks, decodes, prompts, uneven_decodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gllm.core import Limits

BASE_CHUNK = 64

_MOST_TRIES = 1000  # to find a step of one kind: in a small cache there may be none

_SPECIAL, _STAIR = 64, 128
"""For multiples of so many rows cuBLAS has other kernels, on an H200 up to 8 % slower ones, which traffic seldom has;
after a multiple of so many, products take some per cent longer at once."""

_BUSY_TOKENS, _BUSY_CONTEXT = 1280, 1024

_BESIDE_TOKENS, _BESIDE_BATCHES = (512, 1024, 1536, 2048), (16, 64, 256)
"""Of one prompt beside decodes: with a mean context of 1,024, 16 of these read about as much of a layer's cache as the
L2 cache of an H200 holds (2 or 4 KiB a token); what more prompt tokens than these keep does not fit there itself."""

_BEYOND_STEP = 128  # between decode batches beyond the largest graph
_CONTEXTS = (16, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_MIXED_CONTEXTS = frozenset((16, 512, 2048, 8192))
_QUERIES = (1, 16, 32, 64, 128, 256, 512, 576, 1024, 1152, 1536, 2048, 4096, 8192)
"""Doublings, and between them 576 and 1152, just beyond whole waves of programs of chunk attention on an H200 with 8 KV
heads and 4 queries for each (1152 with 2, too), where a few more tokens cost most; and 1536."""

_STARTS = (0, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
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
    token_graph_sizes: tuple[int, ...] = ()  # of steps with chunks
    skips_padding: bool = False  # in graphs: there it costs less than tokens do

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

    def base(self, num_tokens: int) -> Mix:
        """So many tokens in base chunks; in longer ones where a graph of their number does not take so many."""
        is_captured = self.token_graph_sizes != () and num_tokens <= self.token_graph_sizes[-1]
        return prompts(num_tokens, max(BASE_CHUNK, -(-num_tokens // MAX_CHUNKS)) if is_captured else BASE_CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Points of all tables, increasing; `checks` are for none of them."""

    room: Room
    decode_batches: tuple[int, ...]
    batches: tuple[int, ...]  # of decode attention
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    mixed_batches: tuple[int, ...]
    mixed_contexts: tuple[int, ...]  # some of `contexts`
    head_rows: tuple[int, ...]  # beyond the largest graph
    queries: tuple[int, ...]
    starts: tuple[int, ...]
    transfer_tokens: tuple[int, ...]  # none with one stage
    checks: tuple[Mix, ...]

    def base(self, num: int) -> Mix:
        """The step behind `tokens`."""
        return self.room.base(num)

    def decode(self, num: int) -> Mix:
        """The step behind `decode`: at the smallest context."""
        return decodes(num, self.contexts[0])

    def attending(self, num: int, context: int) -> Mix:
        """The step behind `decode_attention`: contexts differ, as in traffic, and so cost more than equal ones."""
        longest = self.room.limits.max_tokens_per_sequence - DRIFT
        return self.decode(num) if context == self.contexts[0] else uneven_decodes(num, context, longest)

    def mixed(self, num: int, context: int) -> Mix:
        """The step behind `mixed`: the same decodes beside a base chunk."""
        return beside_chunk(self.attending(num, context), BASE_CHUNK)

    def head(self, num: int) -> Mix:
        """The step behind `head`: decodes beside a chunk, or alone."""
        mix = self.mixed(num, self.contexts[0])
        return mix if self.room.fits(mix) else self.decode(num)

    @property
    def busy(self) -> Mix | None:
        """A step as an engine under load has it: base chunks, and many decodes with long contexts; None without room.

        It has as many tokens as a point of `tokens`.
        """
        num_tokens = next((num for num in self.tokens if num >= _BUSY_TOKENS), self.tokens[-1])
        for num in reversed(self.batches):
            if num <= num_tokens // 2:
                beside = prompts(num_tokens - num, BASE_CHUNK)
                mix = replace(self.attending(num, self._busy_context), chunks=beside.chunks)
                if self.room.fits(mix):
                    return mix
        return None

    @property
    def beside(self) -> tuple[Mix, ...]:
        """One prompt, of about 512 to 2,048 tokens, beside few decodes and many; in all a point of `tokens`.

        As far as there is room, and chunks as long are measured alone; fewest decodes first.
        """
        found = []
        for num, about in product(_BESIDE_BATCHES, _BESIDE_TOKENS):
            sizes = [each - num for each in self.tokens if BASE_CHUNK < each - num <= self.queries[-1]]
            if num in self.batches and sizes:
                size = min(sizes, key=lambda each: abs(each - about))
                found.append(beside_chunk(self.attending(num, self._busy_context), size))
        return tuple(mix for mix in dict.fromkeys(found) if self.room.fits(mix))

    @property
    def _busy_context(self) -> int:
        return max(each for each in self.contexts if each <= _BUSY_CONTEXT)

    def num_each(self, num_tokens: int, start: int) -> int:
        """How many such chunks a step can hold, 16 at most; 0: not one."""
        fitting = (num for num in range(MOST_EACH, 0, -1) if self.room.fits(chunks(num, start, num_tokens)))
        return next(fitting, 0)

    def mixes(self) -> list[Mix]:
        """All that is measured in flight, each once."""
        each = [chunks(self.num_each(num, start), start, num) for num, start in product(self.queries, self.starts)]
        beyond_graphs = self.room.token_graph_sizes[-1] if self.room.token_graph_sizes else self.room.max_tokens
        found = [
            *(self.base(num) for num in self.tokens),
            *(self.base(mix.num_tokens) for mix in each if mix.num_tokens > beyond_graphs),
            *(self.base(num) for num in self.queries if num > beyond_graphs),
            *(self.base(BASE_CHUNK + num) for num in self.mixed_batches if BASE_CHUNK + num > beyond_graphs),
            *(self.decode(num) for num in self.decode_batches),
            *(self.attending(num, context) for num, context in product(self.batches, self.contexts)),
            *(self.mixed(num, context) for num, context in product(self.mixed_batches, self.mixed_contexts)),
            *(self.head(num) for num in self.head_rows),
            *(chunks(1, start, num) for num, start in product(self.queries, self.starts)),
            *each,
            *([self.busy] if self.busy else []),
            *self.beside,
            *self.checks,
        ]
        return [mix for mix in dict.fromkeys(found) if mix.num_tokens and self.room.fits(mix)]


def make_grid(room: Room, *, quick: bool = False) -> Grid:
    """All points that there is room for; with `quick`, few of them.

    Raises:
        ValueError: There is room for none.
    """
    if not room.fits(prompts(2 * BASE_CHUNK, BASE_CHUNK)):
        raise ValueError(
            f"a profile needs steps of two prompts of {BASE_CHUNK} tokens; raise --max-tokens-per-step, "
            "--max-num-seqs, --max-model-len or the cache"
        )
    room = _with_most_tokens(room)
    longest = room.limits.max_tokens_per_sequence
    contexts = _up_to(longest - DRIFT, _QUICK_CONTEXTS if quick else _CONTEXTS)
    tokens = _doublings(room.max_tokens, 4) if quick else _tokens(room.max_tokens)
    doublings = _doublings(room.limits.max_num_seqs, 8 if quick else 2)
    batches = tuple(num for num in doublings if room.fits(decodes(num, contexts[0])))
    captured = tuple(num for num in room.graph_sizes if room.fits(decodes(num, contexts[0])))
    in_graphs = _with_fewest if room.skips_padding else tuple
    token_sizes = in_graphs(room.token_graph_sizes)
    mixed_batches = _mixed_batches(room, contexts[0], batches)
    queries = _up_to(min(longest, room.max_tokens), _QUICK_QUERIES if quick else _QUERIES)
    return Grid(
        room=room,
        decode_batches=_with_graphs(in_graphs(captured), _beyond(batches)) if captured else batches,
        batches=batches,
        contexts=contexts,
        tokens=_with_graphs(token_sizes, _stairs(tokens)) if token_sizes else tuple(tokens),
        mixed_batches=mixed_batches,
        mixed_contexts=tuple(context for context in contexts if context in _MIXED_CONTEXTS),
        head_rows=_head_rows(room, mixed_batches, batches[-1]),
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


def _with_most_tokens(room: Room) -> Room:
    """With those of a step of base chunks, of which each takes a slot and blocks; inside of graphs, a captured size."""
    limits = room.limits
    num_chunks = min(limits.max_num_seqs, limits.num_blocks // -(-BASE_CHUNK // limits.block_size))
    most = min(room.max_tokens, BASE_CHUNK * num_chunks)
    sizes = tuple(size for size in _up_to(most, room.token_graph_sizes) if room.fits(room.base(size)))
    is_cut = len(sizes) < len(room.token_graph_sizes)
    return replace(room, max_tokens=sizes[-1] if is_cut else most, token_graph_sizes=sizes)


def _tokens(most: int) -> list[int]:
    """Doublings to 64, every 64 to 1024, 128 to 2048, 256 to 8192, then a sixteenth and less."""
    found = _doublings(BASE_CHUNK)
    while found[-1] < most:
        by = BASE_CHUNK << max(0, (found[-1] // 1024).bit_length() - (found[-1] >= 4096))
        found.append(min(found[-1] + by, most))
    return found


def _with_graphs(in_graphs: tuple[int, ...], points: Sequence[int]) -> tuple[int, ...]:
    """In graphs these points alone; beyond them from the first step that is not, which may take much longer."""
    first = in_graphs[-1] + 1
    beyond = [num for num in points if num > first]
    return (*in_graphs, first, *beyond) if points[-1] >= first else in_graphs


def _with_fewest(sizes: Sequence[int]) -> tuple[int, ...]:
    """Graphs, each also with the fewest tokens that it is replayed for."""
    return tuple(num for smaller, size in pairwise((0, *sizes)) for num in sorted({smaller + 1, size}))


def _stairs(points: Sequence[int]) -> list[int]:
    """Steps beyond graphs: first and last of each stair, one on a stair that is between two points; none is special."""
    found: list[int] = []
    for num, following in pairwise(points):
        found.append(num - (num % _SPECIAL == 0))
        if num % _STAIR == 0:
            found.append(num + 1)
        if following - num == _STAIR:
            found.append(num + _STAIR // 2 + 1)
    return [*found, points[-1]]


def _beyond(batches: tuple[int, ...]) -> list[int]:
    """Decode batches as far as graphs may not reach."""
    return [*range(_BEYOND_STEP, batches[-1], _BEYOND_STEP), batches[-1]]


def _mixed_batches(room: Room, context: int, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Decodes beside a base chunk; the last one fills the step or the slots, as far as so many decode alone."""
    most = min(room.limits.max_num_seqs - 1, room.max_tokens - BASE_CHUNK, batches[-1])
    points = dict.fromkeys([*_up_to(most, batches), most])
    return tuple(num for num in points if room.fits(beside_chunk(decodes(num, context), BASE_CHUNK)))


def _head_rows(room: Room, mixed_batches: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Of mixed steps, the most of any, and the first that no graph takes; those that one takes are its own."""
    first = room.graph_sizes[-1] + 1 if room.graph_sizes else 1
    return tuple(num for num in sorted({*mixed_batches, first, most}) if first <= num <= most)


def random_mixes(room: Room, *, num: int, seed: int) -> tuple[Mix, ...]:
    """Steps as traffic makes them: every third only decodes, the others hold chunks too.

    Where these may be in a graph or too long for one, there are as many of either kind.
    """
    generator, longest = random.Random(seed), room.limits.max_tokens_per_sequence
    largest = room.token_graph_sizes[-1] if room.token_graph_sizes else room.max_tokens
    within, beyond = (1, largest), (largest + 1, room.max_tokens)
    kinds = [(0, room.max_tokens), within, beyond if largest < room.max_tokens else within]
    found: list[Mix] = []
    for least, most in islice(cycle(kinds), num):
        for _ in range(_MOST_TRIES):
            mix = _random_mix(room, generator, with_chunks=least > 0, most=most)
            if mix.num_tokens < least:
                more = prompts(generator.randint(least, most) - mix.num_tokens, longest)
                mix = replace(mix, chunks=more.chunks + mix.chunks)
            if mix.num_tokens <= most and room.fits(mix):
                found.append(mix)
                break
    return tuple(found)


def _random_mix(room: Room, generator: random.Random, *, with_chunks: bool, most: int) -> Mix:
    """Chunks of `most` tokens each at most, and decodes."""

    def draw(low: int, high: int) -> int:
        """Small numbers as often as large ones."""
        return min(int(low * (max(high, low) / low) ** generator.random()), max(high, low))

    longest = min(room.limits.max_tokens_per_sequence - DRIFT, _LONGEST_CHECK)
    pieces = []
    for _ in range(draw(1, 8) if with_chunks else 0):
        num_tokens = draw(1, min(most, longest))
        start = generator.randrange(longest - num_tokens + 1) if generator.random() < 0.5 else 0
        pieces.append((start, num_tokens))
    num_decodes = draw(1, room.limits.max_num_seqs)
    contexts = tuple(draw(_CONTEXTS[0], longest) for _ in range(num_decodes))
    return Mix(chunks=tuple(pieces), contexts=contexts, num_final=generator.randint(0, len(pieces)))
