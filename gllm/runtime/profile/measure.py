"""How long a mix takes: medians over steps in a row.

A GPU draws more power in large steps than it may for long: some 50 ms after they began an H200 lowers its clock, by a
tenth to a fifth, which differs between cards. So on a GPU large steps are measured after a rest, a few at a time: such
times are equal to a third of a per cent whatever came before. What they take longer in a row is the clock's part of a
profile (`gllm.runtime.profile.clock`).
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
_SMALL_TOKENS = 64  # steps of so many leave the clock where it is
_REST_S = 0.12
_COOL_NS = 45_000_000  # that a GPU keeps its clock for
_NUM_RESTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of a mix, in ns."""

    layers_ns: int  # of all stages together
    head_ns: int  # of the last stage
    stage_ns: tuple[int, ...]
    gap_ns: int | None  # from a step's end to the next one's start, on the stage that waits least; None: of one alone
    transfer_ns: int | None = None  # from a stage's end to the next one's start; None: there is one stage


def measure(session: Session, maker: StepMaker, mix: Mix, *, alone: bool = False, rests: bool = False) -> Times:
    """Warm up, choose how often to repeat, and measure.

    Args:
        session: with the workers.
        maker: of its steps.
        mix: what to compute.
        alone: each step when the one before is back, so that every stage waits for it.
        rests: repeat it for a while; a large step after rests, no longer than a GPU keeps its clock.
    """
    *_, warm = _repeat(session, maker, mix, _NUM_WARM, alone=alone)
    took_ns = warm[-1].end_ns - warm[0].start_ns
    if rests and mix.num_tokens > _SMALL_TOKENS:
        return _times([_after_rest(session, maker, mix, took_ns) for _ in range(_NUM_RESTS)])
    num = _num_repeats(took_ns)
    rounds = [_repeat(session, maker, mix, num, alone=alone)]
    while rests and rounds[-1][-1][0].end_ns < warm[0].start_ns + _POINT_NS:
        rounds.append(_repeat(session, maker, mix, num, alone=alone))
    return _times(rounds)


def _after_rest(session: Session, maker: StepMaker, mix: Mix, step_ns: int) -> Round:
    """As many steps as the clock stays for; the first after a rest takes longer, and counts only where it is alone."""
    num = min(max(_COOL_NS // max(step_ns, 1), 1), MAX_REPEATS)
    before, steps = maker.make(mix, num)
    session.run(before)
    session.rest(_REST_S)
    return session.run(steps)[num > 1 :]


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
        gap_ns=min(map(median_low, gaps)) if all(gaps) else None,
        transfer_ns=median_low(transfers) if transfers else None,
    )


def _repeat(session: Session, maker: StepMaker, mix: Mix, num: int, *, alone: bool) -> Round:
    before, steps = maker.make(mix, num)
    return session.run([*before, *steps], max_in_flight=1 if alone else None)[len(before) :]


def _num_repeats(step_ns: int) -> int:
    """An odd number: the middle one's contexts are the mix's, and its time is the median where times rise evenly."""
    num = min(max(_POINT_NS // max(step_ns, 1), _MIN_REPEATS), MAX_REPEATS)
    return num - 1 + num % 2
