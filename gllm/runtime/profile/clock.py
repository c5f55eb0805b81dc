"""How the GPU's clock follows what it computes: steps in a row after a rest, and the `GpuClock` that fits them best.

Tables hold times after a rest (`gllm.runtime.profile.measure`). Here prompts come in a row until they have heated the
GPU, then few decodes, which it cools down with; and many decodes with long contexts, whose attention draws power too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gllm.gpu_clock import GpuClock, StageClock
from gllm.runtime.profile.steps import MAX_REPEATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from gllm.runtime.profile.grids import Grid
    from gllm.runtime.profile.measure import Times
    from gllm.runtime.profile.session import Session
    from gllm.runtime.profile.steps import Mix, StepMaker

    Floats = NDArray[np.float64]

_SIZES = (256, 512, 1024, 2048)  # of prompts
_FEW, _MANY, _CONTEXT = 16, 256, 1024  # decodes
_HEATING_NS, _COOLING_NS = 350_000_000, 150_000_000
_REST_S = 0.3
_NUM_ROUNDS = 2
_NUM_FITS = 7
"""After the first; each takes off rested times the heat that by the clock before is in them: long steps have a lot."""

_LEAST = 0.01
"""A smaller slowdown is as good as none: repetitions are no closer to each other."""


class Kind(NamedTuple):
    """Steps of one mix, per stage; what `gllm.gpu_clock` has to know of them."""

    rested_ns: float  # layers
    stretched_ns: float
    power: float  # of arithmetic, as the mean over the step
    attention: float  # share of the step in which the keys of decodes are read

    @classmethod
    def of(cls, num_tokens: int, base_ns: float, layers_ns: float, best_rate: float) -> Kind:
        """Tokens whose base takes so long of all layers; the rest is the attention of decodes."""
        power = min(1.0, num_tokens / (base_ns * best_rate))
        return cls(layers_ns, base_ns, power * base_ns / layers_ns, 1.0 - base_ns / layers_ns)


@dataclass(frozen=True, slots=True)
class Step:
    """One that was measured; `idle_ns` before it the GPU had nothing to do."""

    kind: Kind
    idle_ns: float
    took_ns: float  # layers
    counts: bool  # for the fit, or only for the power that it drew


class _Played(NamedTuple):
    """A `Step` as it was measured: it had so many tokens of `mix`, or prepared them where it does not count."""

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
            "tau_ns": clock.tau_ns,
            "slowdown": round(clock.slowdown, 4),
            "knee": round(clock.knee, 3),
            "attention": round(clock.attention, 3),
            "mean_error": round(self.mean_error, 4),
            "mean_error_without": round(self.mean_error_without, 4),
        }


def measure_clock(session: Session, maker: StepMaker, grid: Grid, times: Mapping[Mix, Times]) -> Clocked | None:
    """Have steps computed and find the clock; None where what a step takes does not depend on those before it.

    Args:
        session: with the workers.
        maker: of its steps.
        grid: whose points are measured.
        times: of its mixes, after a rest.
    """
    course = _Course(session, maker, grid, times)
    played = [list(each) for _ in range(_NUM_ROUNDS) for each in course.all_series()]
    series = [_steps(each, grid, times) for each in played]
    clock, rested = fit(series), times
    if clock is None:
        return None
    for _ in range(_NUM_FITS):
        rested = _without_own_heat(clock, grid, times)
        series = [_steps(each, grid, rested) for each in played]
        clock = fit(series) or clock
    without = replace(clock, slowdown=0.0)
    return Clocked(clock, rested, *(fmean(map(abs, errors(each, series))) for each in (clock, without)))


def _without_own_heat(clock: GpuClock, grid: Grid, times: Mapping[Mix, Times]) -> dict[Mix, Times]:
    """Times as if no step had heated the GPU while it was measured; it is long ones that do."""
    num_stages, best_rate = grid.room.limits.depth, _best_rate(grid, times)

    def cooled(mix: Mix, found: Times) -> Times:
        layers_ns = max(found.layers_ns / num_stages, 1.0)
        base = min(1.0, mix.num_tokens / (layers_ns * best_rate))
        power = base + (1.0 - base) * (clock.attention if mix.contexts else 1.0)
        heat = clock.heat(StageClock(clock).mean(0, int(layers_ns), power))
        factor = 1.0 / (1.0 + clock.slowdown * heat)
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
        return Kind.of(num_tokens, min(base_ns, layers_ns), layers_ns, best_rate)

    def step(one: _Played) -> Step:
        num, took_ns = one.num_tokens, one.took_ns
        what = kind(one.mix, num) if one.counts else Kind.of(num, took_ns, took_ns, best_rate)
        return Step(what, one.idle_ns, took_ns, one.counts)

    return [step(one) for one in played]


def _best_rate(grid: Grid, times: Mapping[Mix, Times]) -> float:
    """Tokens by ns of a stage."""
    return max(num / times[grid.base(num)].layers_ns for num in grid.tokens) * grid.room.limits.depth


class _Course:
    """Has series of steps computed."""

    def __init__(self, session: Session, maker: StepMaker, grid: Grid, times: Mapping[Mix, Times]) -> None:
        self._session, self._maker, self._grid, self._times = session, maker, grid, times

    def all_series(self) -> Iterator[Iterator[_Played]]:
        """Prompts of several sizes, each then with decodes that cool down; then many decodes."""
        grid = self._grid
        few = next((num for num in grid.decode_batches if num >= _FEW), grid.decode_batches[-1])
        sizes = dict.fromkeys(next((num for num in grid.tokens if num >= size), grid.tokens[-1]) for size in _SIZES)
        for num in sizes:
            yield self._series([(grid.base(num), num, _HEATING_NS), (grid.decode(few), few, _COOLING_NS)])
        context = max((each for each in grid.contexts if each <= _CONTEXT), default=grid.contexts[0])
        fitting = (num for num in grid.batches if num <= _MANY and grid.attending(num, context) in self._times)
        many = max(fitting, default=0)
        if many:
            yield self._series([(grid.attending(many, context), many, _HEATING_NS)])

    def _series(self, parts: Sequence[tuple[Mix, int, int]]) -> Iterator[_Played]:
        """So long of each mix, which has so many tokens, after a rest."""
        self._session.rest(_REST_S)
        last_ns: int | None = None
        for mix, num_tokens, for_ns in parts:
            first_ns = None
            while first_ns is None or last_ns is None or last_ns < first_ns + for_ns:
                before, steps = self._maker.make(mix, MAX_REPEATS)
                for number, stamps in enumerate(self._session.run([*before, *steps])):
                    took_ns = sum(stage.head_ns - stage.start_ns for stage in stamps) / len(stamps)
                    idle_ns = 0 if last_ns is None else max(0, stamps[0].start_ns - last_ns)
                    yield _Played(mix, num_tokens, idle_ns, took_ns, number >= len(before))
                    # The first stage is looked at: its next step needs no other's.
                    last_ns, first_ns = stamps[0].end_ns, stamps[0].start_ns if first_ns is None else first_ns


def fit(series: Sequence[Sequence[Step]]) -> GpuClock | None:
    """The clock with the least squares of relative errors; None where steps take the same whatever came before.

    For the other constants the slowdown follows from a linear equation. These are tried on a grid, then around its best
    on a finer one.
    """
    taus, knees, attentions = np.geomspace(15e6, 250e6, 13), np.linspace(0, 0.8, 17), np.linspace(0, 0.95, 11)
    best = _best(series, taus, knees, attentions)
    if best is None:
        return None
    taus = best.tau_ns * np.geomspace(0.8, 1.25, 9)
    knees = np.clip(best.knee + np.linspace(-0.05, 0.05, 11), 0, 0.9)
    attentions = np.clip(best.attention + np.linspace(-0.1, 0.1, 9), 0, 0.99)
    best = _best(series, taus, knees, attentions) or best
    return best if best.slowdown >= _LEAST else None


def _best(series: Sequence[Sequence[Step]], *values: Floats) -> GpuClock | None:
    """Of all combinations of tau, knee and attention."""
    tau_C, knee_C, attention_C = (axis.ravel() for axis in np.meshgrid(*values, indexing="ij"))
    # What is left over of ratio - 1 = slowdown * share * heat, over all steps, as a polynomial of the slowdown.
    squares, products_C, heats_C = 0.0, np.zeros_like(tau_C), np.zeros_like(tau_C)
    for steps in series:
        for step, heat_C in _heats(steps, tau_C, knee_C, attention_C):
            left, share_C = step.took_ns / step.kind.rested_ns - 1.0, heat_C * _share(step)
            squares += left * left
            products_C += left * share_C
            heats_C += share_C * share_C
    slowdown_C = np.clip(np.divide(products_C, heats_C, out=np.zeros_like(heats_C), where=heats_C > 0), 0.0, 0.99)
    error_C = squares - slowdown_C * (2 * products_C - slowdown_C * heats_C)
    at = int(error_C.argmin())
    if not slowdown_C[at]:
        return None
    found = {"slowdown": slowdown_C[at], "knee": knee_C[at], "attention": attention_C[at]}
    return GpuClock(tau_ns=int(tau_C[at]), **{name: float(value) for name, value in found.items()})


def _heats(steps: Sequence[Step], tau_C: Floats, knee_C: Floats, attention_C: Floats) -> Iterator[tuple[Step, Floats]]:
    """Of each step that counts its heat, for each combination: `StageClock` for many clocks at once."""
    average_C = np.zeros_like(tau_C)
    for step in steps:
        power_C = step.kind.power + attention_C * step.kind.attention
        average_C = average_C * np.exp(-step.idle_ns / tau_C)
        x_C = step.took_ns / tau_C
        left_C = np.exp(-x_C)
        mean_C = power_C + (average_C - power_C) * (1.0 - left_C) / x_C
        average_C = power_C + (average_C - power_C) * left_C
        if step.counts:
            yield step, np.clip((mean_C - knee_C) / (1.0 - knee_C), 0.0, 1.0)


def _share(step: Step) -> float:
    return step.kind.stretched_ns / step.kind.rested_ns


def errors(clock: GpuClock, series: Sequence[Sequence[Step]]) -> list[float]:
    """Of each step that counts: predicted less measured, as a share of what was measured."""
    tau, knee, attention = (np.array([float(value)]) for value in (clock.tau_ns, clock.knee, clock.attention))
    return [
        step.kind.rested_ns * (1.0 + clock.slowdown * _share(step) * float(heat[0])) / step.took_ns - 1.0
        for steps in series
        for step, heat in _heats(steps, tau, knee, attention)
    ]
