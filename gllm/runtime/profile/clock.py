"""How the GPU's clock follows what it computes: steps in a row after a rest, for `clock_fit` to find its constants by.

Tables hold times after a rest (`gllm.runtime.profile.measure`). Here prompts of each size come in a row until they have
heated the GPU; then few decodes, which it cools down with; many decodes with long contexts, whose attention draws power
too, alone and beside prompts, for alone they may stay cool; a long chunk that begins late, for the attention of chunks;
and for seconds what a slower limit shows in.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache, cached_property
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.console.progress import show_progress
from gllm.gpu_clock import GpuClock, StageClock
from gllm.runtime.profile.clock_fit import Kind, Step, errors, fit
from gllm.runtime.profile.steps import MAX_REPEATS, chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gllm.runtime.profile.grids import Grid
    from gllm.runtime.profile.measure import Times
    from gllm.runtime.profile.session import Session
    from gllm.runtime.profile.steps import Mix, StepMaker

    Part = tuple[Mix, int, int]  # which has so many tokens, for so long

_LEAST_SIZE, _LARGE_SIZE, _LEAST_APART = 128, 2048, 60  # of prompts: beyond the large one doublings are played
_LONGEST_NS = 100_000_000  # steps that take no longer have come to nothing while a rested one is measured
_COOLED = (256, 512, 1024, 2000)  # with decodes after them
_STEADY = (512, 2000)  # for seconds
_LATE, _LEAST_ATTENTION = 8192, 0.1  # where the chunk starts, at most; share of attention that can be told
_FEW, _MANY, _CONTEXT = 16, 256, 1024  # decodes
_HEATING_NS, _COOLING_NS, _STEADY_NS = 400_000_000, 150_000_000, 3_000_000_000
_TURN_NS = (180_000_000, 45_000_000)  # of prompts and few decodes by turns: three quarters of the power
_REST_S = 0.5
_NUM_ROUNDS = 2
_NUM_FITS = 12
"""After the first; each takes off rested times the heat that by the clock before is in them: long steps have a lot."""


class _Played(NamedTuple):
    """A `Step` as it was measured: of `mix`, or preparing it where it does not count."""

    mix: Mix
    num_tokens: int
    idle_ns: int
    took_ns: float
    counts: bool


class Clocked(NamedTuple):
    """What a profile has of its clock."""

    clock: GpuClock
    times: Mapping[Mix, Times]  # as if no step had heated the GPU while it was measured
    mean_error: float  # of the steps that it is fitted to
    mean_error_without: float  # if they took what they take after a rest

    def part(self) -> dict[str, Any]:
        """The profile's `clock`."""
        clock = self.clock
        return {
            "limits": [
                {"tau_ns": each.tau_ns, "slowdown": round(each.slowdown, 4), "knee": round(each.knee, 3)}
                for each in clock.limits
            ],
            "tokens": list(clock.tokens),
            "power": [round(power, 3) for power in clock.power],
            "prefill": round(clock.prefill, 3),
            "decode": None if clock.decode is None else round(clock.decode, 3),
            "attention": round(clock.attention, 3),
            "mean_error": round(self.mean_error, 4),
            "mean_error_without": round(self.mean_error_without, 4),
        }


def measure_clock(
    session: Session, maker: StepMaker, grid: Grid, times: Mapping[Mix, Times], *, quiet: bool = True
) -> Clocked | None:
    """Have steps computed and find the clock; None where what a step takes does not depend on those before it.

    A small model's steps may draw too little. Some still take longer than others, for what is no heat; a clock that
    is fitted to that brings no step nearer to what it took, and would slow down traffic that the GPU does not.

    Args:
        session: with the workers.
        maker: of its steps.
        grid: whose points are measured.
        times: of its mixes, after a rest.
        quiet: no progress.
    """
    course = _Course(session, maker, grid, times)
    all_parts = list(course.all_parts())
    played: list[list[_Played]] = []
    watching = show_progress(len(all_parts), lambda: len(played), what="series of steps", doing="heating up")
    with nullcontext() if quiet else watching:
        played.extend(list(course.play(parts)) for parts in all_parts)
    series = [_steps(each, grid, times) for each in played]
    found = fit(series)
    if found is None:
        return None
    for _ in range(_NUM_FITS):
        rested = _without_own_heat(found.clock, grid, times)
        series = [_steps(each, grid, rested) for each in played]
        found = fit(series, found) or found
    clock = found.clock
    off, off_without = (fmean(map(abs, errors(each, series))) for each in (clock, replace(clock, limits=())))
    return Clocked(clock, rested, off, off_without) if off < off_without else None


def _without_own_heat(clock: GpuClock, grid: Grid, times: Mapping[Mix, Times]) -> dict[Mix, Times]:
    """Times as if no step had heated the GPU while it was measured; it is long ones that do."""
    num_stages, best_rate = grid.room.limits.depth, _best_rate(grid, times)

    def cooled(mix: Mix, found: Times) -> Times:
        layers_ns = max(found.layers_ns / num_stages, 1.0)
        base = min(1.0, mix.num_tokens / (layers_ns * best_rate))
        power = base * clock.base_power(mix.num_tokens, 1.0, has_chunks=bool(mix.chunks))
        power += (1.0 - base) * (clock.attention if mix.contexts else clock.prefill)
        factor = 1.0 / (1.0 + StageClock(clock).slowdown(0, int(layers_ns), power))
        stage_ns = tuple(int(time_ns * factor) for time_ns in found.stage_ns)
        return replace(found, layers_ns=int(found.layers_ns * factor), stage_ns=stage_ns)

    return {mix: cooled(mix, found) for mix, found in times.items()}


def _steps(played: Sequence[_Played], grid: Grid, times: Mapping[Mix, Times]) -> list[Step]:
    """What the fit has to know of steps, by what mixes take after a rest."""
    num_stages, best_rate = grid.room.limits.depth, _best_rate(grid, times)

    @cache
    def kind(mix: Mix, num_tokens: int) -> Kind:
        base = grid.base(num_tokens) if mix.chunks else grid.decode(num_tokens)
        base_ns, layers_ns = (times[each].layers_ns / num_stages for each in (base, mix))
        holds = {"has_chunks": bool(mix.chunks), "has_decodes": bool(mix.contexts)}
        return make_kind(num_tokens, base_ns, layers_ns, best_rate, **holds)

    def step(one: _Played) -> Step:
        num, took_ns = one.num_tokens, one.took_ns
        what = kind(one.mix, num) if one.counts else make_kind(num, took_ns, took_ns, best_rate, has_chunks=True)
        return Step(what, one.idle_ns, took_ns, one.counts)

    return [step(one) for one in played]


def make_kind(
    num_tokens: int, base_ns: float, layers_ns: float, best_rate: float, *, has_chunks: bool, has_decodes: bool = False
) -> Kind:
    """Tokens whose base takes so long of all layers; the rest is attention: of decodes, if it has any, or of chunks."""
    base_ns = min(base_ns, layers_ns)
    rest_ns = layers_ns - base_ns
    prefill_ns, attention_ns = (0.0, rest_ns) if has_decodes else (rest_ns, 0.0)
    return Kind(num_tokens, has_chunks, min(1.0, num_tokens / (base_ns * best_rate)), base_ns, prefill_ns, attention_ns)


def _best_rate(grid: Grid, times: Mapping[Mix, Times]) -> float:
    """Tokens by ns of a stage."""
    return max(num / times[grid.base(num)].layers_ns for num in grid.tokens) * grid.room.limits.depth


class _Course:
    """Has series of steps computed."""

    def __init__(self, session: Session, maker: StepMaker, grid: Grid, times: Mapping[Mix, Times]) -> None:
        self._session, self._maker, self._grid, self._times = session, maker, grid, times

    def all_parts(self) -> Iterator[list[Part]]:
        """Of each series."""
        for _ in range(_NUM_ROUNDS):
            yield from self._short()
        yield from self._long()

    def _short(self) -> Iterator[list[Part]]:
        """Prompts of every size, some with decodes that cool down; a chunk that begins late; decodes, then both."""
        grid, few = self._grid, self._few
        cooled = set(self._some(_COOLED))
        for num in self._sizes:
            part = (grid.base(num), num, _HEATING_NS)
            yield [part, (grid.decode(few), few, _COOLING_NS)] if num in cooled else [part]
        late = max(self._late_chunks(), default=None)
        if late is not None and late[0] >= _LEAST_ATTENTION:
            _, num, start = late
            yield [(chunks(1, start, num), num, _HEATING_NS)]
        context = max((each for each in grid.contexts if each <= _CONTEXT), default=grid.contexts[0])
        fitting = (num for num in grid.batches if num <= _MANY and grid.attending(num, context) in self._times)
        many = max(fitting, default=0)
        if many:
            yield [(grid.attending(many, context), many, _HEATING_NS)]
        most = max(num for num in grid.decode_batches if num <= max(many, grid.decode_batches[0]))
        yield [(grid.decode(most), most, _HEATING_NS)]
        busy = grid.busy
        if busy is not None and self._is_short(busy):
            yield [(busy, busy.num_tokens, _HEATING_NS)]

    def _long(self) -> Iterator[list[Part]]:
        """Prompts without end, and by turns with few decodes."""
        grid, few = self._grid, self._few
        steady = self._some(_STEADY)
        yield from ([(grid.base(num), num, _STEADY_NS)] for num in steady)
        turn = [(grid.base(steady[-1]), steady[-1], _TURN_NS[0]), (grid.decode(few), few, _TURN_NS[1])]
        yield turn * (_STEADY_NS // sum(_TURN_NS))

    def _late_chunks(self) -> Iterator[tuple[float, int, int]]:
        """Short ones that begin late: attention's share of the step, tokens and start of each."""
        times, grid = self._times, self._grid
        for num, start in product(grid.queries, grid.starts):
            base, mix = grid.base(num), chunks(1, start, num)
            if num >= _LEAST_SIZE and 0 < start <= _LATE and base in times and self._is_short(mix):
                yield 1.0 - times[base].layers_ns / max(times[mix].layers_ns, 1), num, start

    @property
    def _few(self) -> int:
        batches = self._grid.decode_batches
        return next((num for num in batches if num >= _FEW), batches[-1])

    def _some(self, sizes: Sequence[int]) -> list[int]:
        """The next ones that are played."""
        played = self._sizes
        return list(dict.fromkeys(next((num for num in played if num >= size), played[-1]) for size in sizes))

    @cached_property
    def _sizes(self) -> list[int]:
        """Up to 2,048 tokens all that are not next to each other, then doublings, as long as steps are short."""
        found: list[int] = []
        for num in self._grid.tokens:
            last = max(found, default=0)
            is_next = num >= (last + _LEAST_APART if num <= _LARGE_SIZE else 2 * last)
            if num >= _LEAST_SIZE and is_next and self._is_short(self._grid.base(num)):
                found.append(num)
        tokens = self._grid.tokens
        return found or [next((num for num in tokens if num >= _LEAST_SIZE), tokens[-1])]

    def _is_short(self, mix: Mix) -> bool:
        times = self._times.get(mix)
        return times is not None and times.layers_ns <= _LONGEST_NS * self._grid.room.limits.depth

    def play(self, parts: Sequence[Part]) -> Iterator[_Played]:
        """So long of each mix, after a rest."""
        self._session.rest(_REST_S)
        ends_ns: tuple[int, ...] = ()  # of the stages' last step
        for mix, num_tokens, for_ns in parts:
            num_steps = min(max(round(for_ns / max(self._times[mix].layers_ns, 1)), 1), MAX_REPEATS)
            first_ns = None
            while first_ns is None or ends_ns[0] < first_ns + for_ns:
                before, steps = self._maker.make(mix, num_steps)
                for number, stamps in enumerate(self._session.run([*before, *steps])):
                    took_ns = fmean(stage.head_ns - stage.start_ns for stage in stamps)
                    # Stages wait for each other: the mean of this, too, so that both make a step's whole time.
                    waits = (max(0, stage.start_ns - end_ns) for stage, end_ns in zip(stamps, ends_ns, strict=True))
                    idle_ns = int(fmean(waits)) if ends_ns else 0
                    counts = number >= len(before)
                    num = num_tokens if counts else mix.num_sequences  # a row for each
                    yield _Played(mix, num, idle_ns, took_ns, counts)
                    ends_ns = tuple(stage.end_ns for stage in stamps)
                    first_ns = stamps[0].start_ns if first_ns is None else first_ns
