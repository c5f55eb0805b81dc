"""How long a mix takes: medians over steps in a row.

A GPU draws more power in large steps than it may for long: within half a second of them an H200 lowers its clock, and
a step of 1,024 tokens of Qwen3-8B takes a fifth longer than after a rest (benchmarks/NOTES.md, 2026-11-23). Traffic
that is worth a prediction has many of them, so they are measured in that state. Steps of 128 tokens know no such thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low
from typing import TYPE_CHECKING

from gllm.runtime.profile.steps import MAX_REPEATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.runtime.profile.session import Session, Stamps
    from gllm.runtime.profile.steps import Mix, StepMaker

    Round = Sequence[tuple[Stamps, ...]]  # steps in a row, each by stage

_NUM_WARM = 2
_MIN_REPEATS = 3
_POINT_NS = 150_000_000  # that a mix is measured for, if it takes not too few steps
_SETTLED_NS = 500_000_000  # of large steps: the clock comes closer by two thirds of the way every 100 to 150 ms
_SMALL_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of a mix, in ns."""

    layers_ns: int  # of all stages together
    head_ns: int  # of the last stage
    stage_ns: tuple[int, ...]
    gap_ns: int  # from the end of a step to the start of the next, on the stage that waits least for the others
    transfer_ns: int | None = None  # from a stage's end to the next one's start; None: there is one stage


def measure(session: Session, maker: StepMaker, mix: Mix, *, alone: bool = False, settles: bool = False) -> Times:
    """Warm up, choose how often to repeat, and measure.

    Args:
        session: with the workers.
        maker: of its steps.
        mix: what to compute.
        alone: each step when the one before is back, so that every stage waits for it.
        settles: repeat it until medians are steady; a large step until the GPU has the clock that it keeps, too.
    """
    *_, warm = _repeat(session, maker, mix, _NUM_WARM, alone=alone)
    num = _num_repeats(warm[-1].end_ns - warm[0].start_ns)
    rounds = [_repeat(session, maker, mix, num, alone=alone)]
    if not settles:
        return _times(rounds)
    start_ns, for_ns = warm[0].start_ns, _SETTLED_NS if mix.num_tokens > _SMALL_TOKENS else _POINT_NS
    while rounds[-1][-1][0].end_ns < start_ns + for_ns:
        rounds.append(_repeat(session, maker, mix, num, alone=alone))
    settled_ns = start_ns + for_ns * 2 // 3 if for_ns == _SETTLED_NS else start_ns
    return _times([each for each in rounds if each[0][0].start_ns >= settled_ns] or rounds[-1:])


def _times(rounds: Sequence[Round]) -> Times:
    times = [step for steps in rounds for step in steps]
    layers = [sum(stage.head_ns - stage.start_ns for stage in step) for step in times]
    by_stage = [zip(*steps, strict=True) for steps in rounds]  # the stamps of each stage
    gaps = [
        [after.start_ns - before.end_ns for stage in stages for before, after in pairwise(stage)]
        for stages in zip(*by_stage, strict=True)
    ]
    transfers = [after.start_ns - before.end_ns for step in times for before, after in pairwise(step)]
    return Times(
        layers_ns=median_low(layers),
        head_ns=median_low(step[-1].end_ns - step[-1].head_ns for step in times),
        stage_ns=tuple(median_low(one.end_ns - one.start_ns for one in stage) for stage in zip(*times, strict=True)),
        gap_ns=min(map(median_low, gaps)),
        transfer_ns=median_low(transfers) if transfers else None,
    )


def _repeat(session: Session, maker: StepMaker, mix: Mix, num: int, *, alone: bool) -> Round:
    before, steps = maker.make(mix, num)
    return session.run([*before, *steps], max_in_flight=1 if alone else None)[len(before) :]


def _num_repeats(step_ns: int) -> int:
    """An odd number: the middle one's contexts are the mix's, and its time is the median where times rise evenly."""
    num = min(max(_POINT_NS // max(step_ns, 1), _MIN_REPEATS), MAX_REPEATS)
    return num - 1 + num % 2
