"""How the GPU's clock follows what it computes: steps in a row after a rest, and the `GpuClock` that fits them best.

Tables hold times of steps in a row with their like (`gllm.runtime.profile.measure`). Here the same steps are the first
ones after a while of decodes, which draw little. How much less the first takes is the clock's slowdown, how soon the
others come to their own time its tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from statistics import median_low
from typing import TYPE_CHECKING, Any

from gllm.gpu_clock import GpuClock, StageClock
from gllm.runtime.profile.steps import MAX_REPEATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gllm.runtime.profile.grids import Grid
    from gllm.runtime.profile.session import Session
    from gllm.runtime.profile.steps import Mix, StepMaker

_SIZES = (128, 256, 512, 1024, 2048)
_NUM_ROUNDS = 3
_REST_NS = 500_000_000  # of decodes: some four times the tau of an H200
_RESTING = 16  # sequences that decode then
_TAUS_NS = tuple(int(20e6 * 1.05**number) for number in range(65))  # to 454 ms: steps in a row tell of no more
_KNEES = tuple(number / 20 for number in range(17))
_LEAST = 0.01
"""A smaller slowdown is as good as none: repetitions are no closer to each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Steps of one kind in a row, the first after a rest; layers of all stages together."""

    num_tokens: int
    settled_ns: int
    rested_ns: tuple[int, ...]


def measure_clock(session: Session, maker: StepMaker, grid: Grid, settled_ns: Mapping[int, int]) -> dict[str, Any]:
    """A profile's `clock`; empty where what a step takes does not depend on those before it.

    Args:
        session: with the workers.
        maker: of its steps.
        grid: whose points of `tokens` are measured.
        settled_ns: what they take in a row with their like, by tokens.
    """
    sizes = dict.fromkeys(next((num for num in settled_ns if num >= size), 0) for size in _SIZES)
    resting = grid.decode(min(_RESTING, grid.decode_batches[-1]))
    series = []
    for num in filter(None, sizes):
        rounds = [_after_rest(session, maker, resting, grid.base(num)) for _ in range(_NUM_ROUNDS)]
        rested_ns = tuple(map(median_low, zip(*rounds, strict=True)))
        series.append(Series(num_tokens=num, settled_ns=settled_ns[num], rested_ns=rested_ns))
    best_rate = max(num / ns for num, ns in settled_ns.items())
    clock = fit(series, best_rate) if series else None
    if clock is None:
        return {}
    return {
        "tau_ns": clock.tau_ns,
        "slowdown": round(clock.slowdown, 4),
        "knee": clock.knee,
        "tokens": [each.num_tokens for each in series],
        "settled_ns": [each.settled_ns for each in series],
        "rested_ns": [each.rested_ns for each in series],
    }


def _after_rest(session: Session, maker: StepMaker, resting: Mix, mix: Mix) -> list[int]:
    """Layers of a mix, as often in a row as one may be, after decodes."""
    rested_ns = 0
    while rested_ns < _REST_NS:
        before, steps = maker.make(resting, MAX_REPEATS)
        stamps = session.run([*before, *steps])
        rested_ns += stamps[-1][0].end_ns - stamps[0][0].start_ns
    before, steps = maker.make(mix, MAX_REPEATS)
    assert not before, "prompts begin at their start"
    return [sum(stage.head_ns - stage.start_ns for stage in step) for step in session.run(steps)]


def fit(series: Sequence[Series], best_rate: float) -> GpuClock | None:
    """The clock with the least squares of relative errors; None where steps are as fast after a rest.

    For a tau and a knee, the slowdown follows from a linear equation; these are tried one after another.
    `best_rate` is of tokens by ns, as the reader of the profile takes it.
    """
    best: GpuClock | None = None
    least = 0.0
    for tau_ns, knee in product(_TAUS_NS, _KNEES):
        clock = GpuClock(tau_ns=tau_ns, slowdown=0.0, knee=knee)
        heats = [heat for each in series for heat in _heats(clock, each, best_rate)]
        # ratio = (1 + slowdown * heat) / (1 + slowdown * steady), multiplied out
        slopes = [heat - ratio * steady for heat, steady, ratio in heats]
        squares = sum(slope * slope for slope in slopes)
        if not squares:
            continue
        products = (slope * (ratio - 1.0) for slope, (_, _, ratio) in zip(slopes, heats, strict=True))
        slowdown = sum(products) / squares
        if not _LEAST <= slowdown < 1.0:
            continue
        clock = GpuClock(tau_ns=tau_ns, slowdown=slowdown, knee=knee)
        error = sum((clock.factor(heat, steady) - ratio) ** 2 for heat, steady, ratio in heats)
        if best is None or error < least:
            best, least = clock, error
    return best


def _heats(clock: GpuClock, series: Series, best_rate: float) -> Iterator[tuple[float, float, float]]:
    """Of each step its mean heat, where that settles, and what it took by the settled time."""
    steady = clock.steady_heat(series.num_tokens / series.settled_ns / best_rate)
    stage = StageClock(clock)
    for time_ns in series.rested_ns:
        yield stage.mean(0, series.settled_ns, steady), steady, time_ns / series.settled_ns
