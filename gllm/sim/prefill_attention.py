"""What the attention of a step's chunks takes: read from two tables, and corrected by the schedule of its kernel.

The tables hold what a chunk takes alone and what each of equal ones does, by tokens and tokens before it, beyond as
many tokens in base chunks. Between their points, and for unlike chunks, they know nothing of the waves in which the
kernel's programs run. Where the profile says what that kernel is like (`chunk_kernel`), its schedule is played for the
step and for the tables' points (`gllm.chunk_schedule`), and what differs is added.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import fsum
from typing import TYPE_CHECKING

from gllm.chunk_schedule import duration
from gllm.graph_sizes import MAX_CHUNKS
from gllm.sim.interpolation import Curve, Sheet, Surface, look_up, look_up_padded, two_times

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gllm.chunk_schedule import ChunkKernel
    from gllm.sim.cost import Chunk
    from gllm.sim.profile import Profile, StepRoom

    Outside = Callable[[str], None]

_LEAST_NS = 20_000  # of a layer: times from which a tile's is taken
_KEPT = 1 << 14  # steps, of which a trace that is simulated again has the same


class PrefillAttention:
    """Nanoseconds of all layers.

    Args:
        profile: with the tables.
        figure: by tokens and tokens before them, in proportion to which tables go on.
        outside: told FEWER or MORE of a chunk's tokens and of those before it, where they are beyond the tables.
    """

    def __init__(self, profile: Profile, figure: Callable[[int, int], float], outside: tuple[Outside, Outside]) -> None:
        tables = profile.prefill_one, profile.prefill_each
        self._measured = _Tables(*tables, figure, outside)
        self._tile_ns, self._schedule = 0.0, None
        if profile.chunk_kernel is not None and profile.room is not None:
            schedule = _Schedule(profile, profile.chunk_kernel)
            lengths = schedule.lengths(profile.room)
            self._tile_ns = _slope(tables[0], lengths[0], _LEAST_NS * profile.num_layers)
            self._schedule, self._played = schedule, _Tables(*lengths, figure, (_untold, _untold))

    def time_ns(self, chunks: Sequence[Chunk], num_tokens: int, num_decode: int) -> float:
        """Of the chunks of a step of so many tokens in all, so many of them of decodes."""
        time_ns, schedule = self._measured.read(chunks), self._schedule
        if schedule is None:
            return time_ns
        held = schedule.base(num_tokens) - (schedule.decodes(num_decode) if num_decode else 0.0)
        tiles = schedule.duration(tuple([(chunk.start, chunk.num_tokens) for chunk in chunks])) - held
        return time_ns + self._tile_ns * (tiles - self._played.read(chunks))


class _Tables:
    """Of chunks alone, and of each of equal ones."""

    def __init__(
        self, one: Surface, each: Surface, figure: Callable[[int, int], float], outside: tuple[Outside, Outside]
    ) -> None:
        one_sheet, each_sheet = Sheet(one, figure, *outside), Sheet(each, figure, *outside)
        self._alone = cache(lambda num_tokens: one_sheet.slice(num_tokens).times())
        self._both = cache(lambda num_tokens: two_times(one_sheet.slice(num_tokens), each_sheet.slice(num_tokens)))

    def read(self, chunks: Sequence[Chunk]) -> float:
        """One takes what it takes alone; several share the GPU."""
        if len(chunks) == 1:
            return self._alone(chunks[0].num_tokens)(chunks[0].start)
        both = self._both
        times = [both(chunk.num_tokens)(chunk.start) for chunk in chunks]
        alone, _ = max(times)
        return max(alone, fsum([each for _, each in times]))


class _Schedule:
    """Durations by the kernel's schedule, in tiles."""

    def __init__(self, profile: Profile, kernel: ChunkKernel) -> None:
        self._profile, self._kernel = profile, kernel
        self.duration = lru_cache(_KEPT)(lambda chunks: duration(kernel, chunks))
        # What the tables of tokens and of mixed steps hold, read as they are: the latter is beyond `tokens(64 + n)`.
        bases = Curve(profile.tokens.at, tuple(map(self._in_base_chunks, profile.tokens.at)))
        self.base = cache(look_up_padded(bases, profile.token_graph_sizes, self._in_base_chunks, _untold))
        chunk, rows = profile.base_chunk, profile.mixed.rows
        beside = Curve(rows, tuple(self.base(chunk + num) - self.base(chunk) for num in rows))
        self.decodes = cache(lambda num: look_up(beside, num, lambda _: 1.0, _untold))

    def _in_base_chunks(self, num_tokens: int) -> float:
        """So many tokens in base chunks; in longer ones where a graph of their number does not take so many."""
        size, graph_sizes = self._profile.base_chunk, self._profile.token_graph_sizes
        if graph_sizes and num_tokens <= graph_sizes[-1]:
            size = max(size, -(-num_tokens // MAX_CHUNKS))
        num_whole, rest = divmod(num_tokens, size)
        return duration(self._kernel, [(0, size)] * num_whole + [(0, rest)] * bool(rest))

    def lengths(self, room: StepRoom) -> tuple[Surface, Surface]:
        """What the profile's tables would hold if a tile took one nanosecond."""
        one, each = self._profile.prefill_one, self._profile.prefill_each
        return self._lengths(one, lambda *_: 1), self._lengths(each, room.num_each)

    def _lengths(self, table: Surface, count: Callable[[int, int], int]) -> Surface:
        def length(num_tokens: int, start: int, time_ns: float | None) -> float | None:
            if time_ns is None:
                return None
            num = count(num_tokens, start)
            return (duration(self._kernel, [(start, num_tokens)] * num) - self.base(num * num_tokens)) / num

        def line(row: int, times: Sequence[float | None]) -> tuple[float | None, ...]:
            return tuple(length(row, *point) for point in zip(table.columns, times, strict=True))

        return table._replace(ns=tuple(map(line, table.rows, table.ns)))


def _slope(times: Surface, lengths: Surface, least_ns: float) -> float:
    """Nanoseconds a tile: least squares of relative errors, over times that are not too short to say; else 0."""
    pairs = [pair for lines in zip(times.ns, lengths.ns, strict=True) for pair in zip(*lines, strict=True)]
    shares = [tiles / ns for ns, tiles in pairs if ns is not None and tiles is not None and ns > least_ns]
    return max(fsum(shares), 0.0) / fsum([share * share for share in shares]) if any(shares) else 0.0


def _untold(_: str) -> None:
    """What lies beyond the tables was told of their times."""
