"""The `GpuClock` that fits measured series of steps best.

Three things are found, one after the other and over again, since each needs the others:

1. What each size of step comes to when it goes on and on (`_Shape`). At a limit of power that depends on how well
   a size fills the GPU after a rest, so no formula has it.
2. The constants of the first limit: how soon heat comes and goes, and what decodes' attention does to it.
3. Those of a second, slower one, if series of seconds show it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gllm.gpu_clock import GpuClock, PowerLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Power = Callable[["Kind"], Floats]

_SETTLED_NS, SOON_NS = 120_000_000, 700_000_000
"""From when on steps in a row take the same, and until when a slower limit does not show."""

_NUM_TURNS, _NUM_MORE = 5, 2
_LEAST = 0.01
"""A smaller slowdown is as good as none: repetitions are no closer to each other."""

_LEAST_HEAT = 0.1
"""As a share of the most, of a size that tells how much power it draws; what others draw follows from their rate."""


class Kind(NamedTuple):
    """Steps of one mix, per stage and after a rest; what `gllm.gpu_clock` has to know of them."""

    num_tokens: int
    has_chunks: bool
    rate: float  # of tokens in `base_ns`, as a share of the best one
    base_ns: float
    prefill_ns: float  # attention of chunks
    attention_ns: float  # of decodes

    @property
    def rested_ns(self) -> float:
        """Of the layers."""
        return self.base_ns + self.prefill_ns + self.attention_ns

    @property
    def stretched_ns(self) -> float:
        """What the clock stretches of it."""
        return self.base_ns + self.prefill_ns

    @property
    def share(self) -> float:
        """Of `stretched_ns`."""
        return self.stretched_ns / self.rested_ns

    @property
    def is_base(self) -> bool:
        """Tokens and no attention."""
        return not self.attention_ns and not self.prefill_ns


@dataclass(frozen=True, slots=True)
class Step:
    """One that was measured; `idle_ns` before it the GPU had nothing to do. The head, which is short, is left out."""

    kind: Kind
    idle_ns: float
    took_ns: float  # layers
    counts: bool  # for the fit, or only for the power that it drew

    @property
    def all_ns(self) -> float:
        """From the end of the one before to its own."""
        return self.idle_ns + self.took_ns

    @property
    def left(self) -> float:
        """By what share it took longer than after a rest."""
        return self.took_ns / self.kind.rested_ns - 1.0


@dataclass(frozen=True, slots=True)
class _Shape:
    """What kinds of work come to when they go on and on."""

    rates: Mapping[int, float]  # of sizes, increasing
    heats: Mapping[int, float]
    prefill: float  # heat of chunks' attention; below 0 it cools
    decode_rate: float  # of decodes alone
    decode: float  # their heat

    def powers(self, knee_C: Floats, attention_C: Floats) -> Power:
        """Power of kinds, for each combination; `GpuClock.base_power` for many clocks at once."""
        sizes, rates = self._telling()
        heats = np.array([self.heats[int(size)] for size in sizes])
        prefill_C = np.clip(knee_C + (1.0 - knee_C) * self.prefill, 0.0, 1.0)

        @cache
        def power(kind: Kind) -> Floats:
            if kind.has_chunks or not self._tells_of_decodes():
                knees = kind.rate * float(np.interp(kind.num_tokens, sizes, 1.0 / rates))
                above = kind.rate * float(np.interp(kind.num_tokens, sizes, heats / rates))
            else:
                knees = kind.rate / self.decode_rate
                above = knees * self.decode
            base_C = np.minimum(knee_C * knees + (1.0 - knee_C) * above, 1.0)
            drawn_C = base_C * kind.base_ns + prefill_C * kind.prefill_ns + attention_C * kind.attention_ns
            return np.asarray(drawn_C / kind.rested_ns)

        return power

    def clock(self, limit: PowerLimit, attention: float) -> GpuClock:
        """That has these powers."""
        sizes, rates = self._telling()

        def power(heat: float) -> float:
            return float(limit.knee + (1.0 - limit.knee) * heat)

        return GpuClock(
            limits=(limit,),
            attention=attention,
            prefill=min(max(power(self.prefill), 0.0), 1.0),
            tokens=tuple(map(int, sizes)),
            power=tuple(power(self.heats[int(size)]) / float(rate) for size, rate in zip(sizes, rates, strict=True)),
            decode=power(self.decode) / self.decode_rate if self._tells_of_decodes() else None,
        )

    def _tells_of_decodes(self) -> bool:
        return self.decode >= _LEAST_HEAT

    def _telling(self) -> tuple[Floats, Floats]:
        """Sizes that get warm, and their rates."""
        least = _LEAST_HEAT * max(self.heats.values())
        sizes = [size for size, heat in self.heats.items() if heat >= least]
        return np.array(sizes, dtype=float), np.array([self.rates[size] for size in sizes])


class _Settled:
    """What steps in a row take longer once that stays the same: the mean of each kind, over all series that have it."""

    def __init__(self, series: Sequence[Sequence[Step]]) -> None:
        self.series = [(steps, settled) for steps in series if (settled := _settled(steps))]

    def by_kind(self, values: Callable[[Sequence[Step], Sequence[Step]], Sequence[float]]) -> dict[Kind, float]:
        """The mean of what each series gives for its settled steps."""
        found: dict[Kind, list[float]] = defaultdict(list)
        for steps, settled in self.series:
            found[settled[0].kind] += values(steps, settled)
        return {kind: fmean(found[kind]) for kind in sorted(found)}


def _settled(steps: Sequence[Step]) -> list[Step]:
    """Those at the beginning that are of one kind, no decodes with long contexts, once they take the same."""
    counting = [step for step in steps if step.counts]
    if not counting or counting[0].kind.attention_ns:
        return []
    kind, last, at_ns, found = counting[0].kind, counting[0], 0.0, []
    for step in takewhile(lambda step: step.kind == kind or not step.counts, steps):
        if step.counts:
            found += [step] if _SETTLED_NS <= at_ns < SOON_NS else []
            last = step
        at_ns += step.all_ns
    return (found or [last]) if at_ns >= 2 * _SETTLED_NS else []


class Fit(NamedTuple):
    """A clock, and what to begin with where steps have changed but little."""

    clock: GpuClock
    first_only: GpuClock  # without a second limit
    shape: _Shape


def fit(series: Sequence[Sequence[Step]], before: Fit | None = None) -> Fit | None:
    """The clock with the least squares of relative errors; None where steps take the same whatever came before.

    Args:
        series: of steps, each after a rest. Those that begin with chunks alone in a row say what such steps come to;
            those of seconds, what a second limit does.
        before: of nearly the same series.
    """
    settled = _Settled(series)
    measured = settled.by_kind(lambda _, steps: [step.left for step in steps])
    soon = [list(_until(steps, SOON_NS)) for steps in series]
    if before is None:
        shape = _first_shape(measured)
        if shape is None:
            return None
        taus, knees, attentions = np.geomspace(15e6, 250e6, 13), np.linspace(0, 0.8, 17), np.linspace(0, 0.95, 11)
        clock = _first_limit(soon, shape, taus, knees, attentions)
    else:
        shape, clock = before.shape, before.first_only
    for _ in range(_NUM_TURNS if before is None else _NUM_MORE):
        shape, limit = _nearer(shape, clock, settled, measured), clock.limits[0]
        clock = _first_limit(
            soon,
            shape,
            limit.tau_ns * np.geomspace(0.8, 1.25, 9),
            np.clip(limit.knee + np.linspace(-0.05, 0.05, 11), 0, 0.9),
            np.clip(clock.attention + np.linspace(-0.1, 0.1, 9), 0, 0.99),
        )
    if clock.limits[0].slowdown < _LEAST:
        return None
    long = [steps for steps in series if sum(step.all_ns for step in steps) > 2 * SOON_NS]
    second = _second_limit(long, clock) if long else None
    return Fit(replace(clock, limits=(*clock.limits, second)) if second else clock, clock, shape)


def _until(steps: Sequence[Step], until_ns: float) -> Iterator[Step]:
    """Those that begin before that."""
    at_ns = 0.0
    for step in steps:
        if at_ns >= until_ns:
            return
        yield step
        at_ns += step.all_ns


def _first_shape(measured: Mapping[Kind, float]) -> _Shape | None:
    """As if steps in a row were at full heat of their own from the first settled one on."""
    slower = {kind.num_tokens: max(0.0, value) for kind, value in measured.items() if kind.is_base and kind.has_chunks}
    decodes = [(kind.rate, max(0.0, value)) for kind, value in measured.items() if not kind.has_chunks]
    decode_rate, decode = map(fmean, zip(*decodes, strict=True)) if decodes else (1.0, 0.0)
    most = max([*slower.values(), decode])
    if max(slower.values(), default=0.0) < _LEAST:
        return None
    heats = {size: value / most for size, value in slower.items()}
    rates = {kind.num_tokens: kind.rate for kind in measured if kind.is_base and kind.has_chunks}
    late = [
        (value / most / kind.share * kind.rested_ns - kind.base_ns * heats.get(kind.num_tokens, 1.0)) / kind.prefill_ns
        for kind, value in measured.items()
        if kind.prefill_ns
    ]  # what is slower than after a rest, less what the tokens are, is the attention's
    return _Shape(rates, heats, fmean(late) if late else 1.0, decode_rate, decode / most)


def _nearer(shape: _Shape, clock: GpuClock, settled: _Settled, measured: Mapping[Kind, float]) -> _Shape:
    """The shape that brings settled steps nearer to what they took, by this clock."""

    def predicted(steps: Sequence[Step], some: Sequence[Step]) -> list[float]:
        ratios = {id(step): ratio for step, ratio in _ratios(clock, steps)}
        return [ratios[id(step)] for step in some]

    off = {kind: (measured[kind] - value) / kind.share for kind, value in settled.by_kind(predicted).items()}
    slowdown = clock.limits[0].slowdown
    slower = {
        kind.num_tokens: max(0.0, shape.heats[kind.num_tokens] * slowdown + value)
        for kind, value in off.items()
        if kind.is_base and kind.num_tokens in shape.heats and kind.has_chunks
    }
    decodes = [max(0.0, shape.decode * slowdown + value) for kind, value in off.items() if not kind.has_chunks]
    most = max([*slower.values(), *decodes])
    if not most:
        return shape
    late = [value / most * kind.rested_ns / kind.prefill_ns for kind, value in off.items() if kind.prefill_ns]
    return replace(
        shape,
        heats={size: value / most for size, value in slower.items()},
        prefill=shape.prefill + fmean(late) if late else shape.prefill,
        decode=fmean(decodes) / most if decodes else shape.decode,
    )


def _first_limit(series: Sequence[Sequence[Step]], shape: _Shape, *values: Floats) -> GpuClock:
    """The best of all combinations of tau, knee and attention."""
    tau_C, knee_C, attention_C = (axis.ravel() for axis in np.meshgrid(*values, indexing="ij"))
    power, squares = shape.powers(knee_C, attention_C), _Squares(tau_C)
    for steps in series:
        for step, mean_C in _means(steps, tau_C, power):
            squares.add(step.left, step.kind.share * _heat(mean_C, knee_C))
    at, slowdown = squares.best()
    limit = PowerLimit(tau_ns=int(tau_C[at]), slowdown=slowdown, knee=float(knee_C[at]))
    return shape.clock(limit, float(attention_C[at]))


def _second_limit(series: Sequence[Sequence[Step]], clock: GpuClock) -> PowerLimit | None:
    """What the first one leaves over in series of seconds; None where that is nothing."""
    values = np.geomspace(150e6, 1500e6, 11), np.linspace(0.2, 0.95, 16)
    tau_C, knee_C = (axis.ravel() for axis in np.meshgrid(*values, indexing="ij"))
    power = cache(lambda kind: np.full_like(tau_C, power_of(clock, kind)))
    squares = _Squares(tau_C)
    for steps in series:
        known = _ratios(clock, steps)
        for (step, ratio), (_, mean_C) in zip(known, _means(steps, tau_C, power), strict=True):
            squares.add(step.left - ratio, step.kind.share * _heat(mean_C, knee_C))
    at, slowdown = squares.best()
    is_within = tau_C.min() < tau_C[at] < tau_C.max()  # at an end of what is tried, it is something else that shows
    if slowdown < _LEAST or not is_within:
        return None
    return PowerLimit(tau_ns=int(tau_C[at]), slowdown=slowdown, knee=float(knee_C[at]))


class _Squares:
    """The sum of (left - slowdown * heat)^2 as a polynomial of the slowdown, for each combination."""

    def __init__(self, like_C: Floats) -> None:
        self._left, self._products_C, self._heats_C = 0.0, np.zeros_like(like_C), np.zeros_like(like_C)

    def add(self, left: float, heat_C: Floats) -> None:
        """One step."""
        self._left += left * left
        self._products_C += left * heat_C
        self._heats_C += heat_C * heat_C

    def best(self) -> tuple[int, float]:
        """The combination with the least, and its slowdown."""
        products_C, heats_C = self._products_C, self._heats_C
        slowdown_C = np.divide(products_C, heats_C, out=np.zeros_like(heats_C), where=heats_C > 0).clip(0.0, 0.99)
        error_C = self._left - slowdown_C * (2 * products_C - slowdown_C * heats_C)
        at = int(error_C.argmin())
        return at, float(slowdown_C[at])


def _means(steps: Sequence[Step], tau_C: Floats, power: Power) -> Iterator[tuple[Step, Floats]]:
    """Of each step that counts the mean of the average, for each combination: `PowerAverage` for many at once."""
    average_C = np.zeros_like(tau_C)
    for step in steps:
        power_C = power(step.kind)
        if step.idle_ns:
            average_C = average_C * np.exp(-step.idle_ns / tau_C)
        x_C, above_C = step.took_ns / tau_C, average_C - power_C
        left_C = np.exp(-x_C)
        average_C = power_C + above_C * left_C
        if step.counts:
            yield step, power_C + above_C * (1.0 - left_C) / x_C


def _heat(mean_C: Floats, knee_C: Floats | float) -> Floats:
    return np.clip((mean_C - knee_C) / (1.0 - knee_C), 0.0, 1.0)


def power_of(clock: GpuClock, kind: Kind) -> float:
    """What steps of a kind draw."""
    base_ns = kind.base_ns * clock.base_power(kind.num_tokens, kind.rate, has_chunks=kind.has_chunks)
    return (base_ns + kind.prefill_ns * clock.prefill + kind.attention_ns * clock.attention) / kind.rested_ns


def _ratios(clock: GpuClock, steps: Sequence[Step]) -> list[tuple[Step, float]]:
    """Of each step that counts, by what share it takes longer by a clock."""
    power = cache(lambda kind: np.array([power_of(clock, kind)]))
    found: dict[int, float] = defaultdict(float)
    counting = [step for step in steps if step.counts]
    for limit in clock.limits:
        means = _means(steps, np.array([float(limit.tau_ns)]), power)
        for number, (step, mean_C) in enumerate(means):
            found[number] += limit.slowdown * step.kind.share * float(_heat(mean_C, limit.knee)[0])
    return [(step, found[number]) for number, step in enumerate(counting)]


def errors(clock: GpuClock, series: Sequence[Sequence[Step]]) -> list[float]:
    """Of each step that counts: predicted less measured, as a share of what was measured."""
    return [
        step.kind.rested_ns * (1.0 + ratio) / step.took_ns - 1.0
        for steps in series
        for step, ratio in _ratios(clock, steps)
    ]
