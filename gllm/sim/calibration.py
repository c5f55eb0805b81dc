"""How far a profile is from the hardware, and cost models that are off as the hardware may be.

A profile's checks are steps that were measured for no table. Each gives a ratio, measured by predicted, and ratios of
one kind of step (decodes alone, or with chunks; of many checks the smaller and the larger half by themselves) are
taken for draws from one distribution. What steps are off by then has two parts:

    common    to all steps of the kind: the mean of its ratios, which is known as well as so few checks tell it
    own       to one composition: how far its ratio is from that mean, the same each time the step comes again

The difference matters. Own errors fall to both sides and even out over a run's many compositions; common ones do not.
So an interval on throughput comes from the common part, one on a p99 between tokens, which hangs on a few large steps,
from both. Own errors are a composition's and not a step's: checks are medians of repetitions, so what is left is what
tables with points a factor of two apart get wrong, and steps between the same points get it wrong alike. A draw for
every single step would even out over thousands of steps that are all but the same, and promise too much.

Both parts are bootstrapped. A `ReplicaCost` draws as many ratios of a kind as there are, with replacement, and takes
their mean for the common part; each neighbourhood, steps within a factor of two in all sums of their work, draws one
ratio for its own. No distribution is assumed of errors, and machines agree to the last bit.

A run's steps are less unlike in themselves than checks, which are drawn to be so, and more unlike than the tables' own
points, where a profile is exact: a replica has a share of the common part, from none to all of it, either more likely
than what lies between. And two machines of a kind differ: all steps of a replica take some more or less alike.

Not in it: how repetitions of a step and of runs vary, which a profile does not hold; the times beside the stages
(gaps, transfers, the host's); what was scaled to another GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, sqrt
from random import Random
from typing import TYPE_CHECKING

from gllm.parallel import Parallel
from gllm.sim.cost import Load
from gllm.sim.gpus import GPUS
from gllm.sim.profiled import Profiled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gllm.sim.cost import CostModel, Work
    from gllm.sim.profile import MeasuredStep, Profile

MIN_CHECKS = 4
"""Of a kind; with fewer it shares those of all kinds."""

_MIN_HALF = 8
"""Checks on either side where a kind is split by size."""

MACHINES = 0.015
"""How far a machine is taken to be from a profile's at most, as a share: profiles of Qwen3-8B made on two H200s on one
day differ by 1 to 1.5 % in decodes, by 2 % in their attention (benchmarks/NOTES.md)."""

_LEAST = 0.1
"""Times the prediction: what a step takes at least, however far off the checks are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Ratios, measured by predicted, of the checks that speak for one kind of step."""

    kind: str
    ratios: tuple[float, ...]

    @property
    def mean(self) -> float:
        """What a step takes by what is predicted; its distance from 1 is the bias."""
        return _mean(self.ratios)

    @property
    def spread(self) -> float:
        """Standard deviation of one step's."""
        mean = self.mean
        return sqrt(fsum((ratio - mean) * (ratio - mean) for ratio in self.ratios) / (len(self.ratios) - 1))

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.spread / sqrt(len(self.ratios))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a profile's checks say of its errors."""

    errors: tuple[Errors, ...]  # by `class_of`: small and large decode steps, small and large steps with chunks
    most_small: tuple[int | None, int | None]  # tokens, without chunks and with; None: all sizes are alike

    def to_json(self) -> dict[str, dict[str, float]]:
        """Of each kind its number of checks, and of their ratios, measured by predicted, the statistics."""
        return {
            each.kind: {
                "num_checks": len(each.ratios),
                "mean": each.mean,
                "standard_error": each.standard_error,
                "spread": each.spread,
            }
            for each in self.errors
        }

    def class_of(self, work: Work) -> int:
        """Index of the errors that a step is subject to."""
        num_chunked = work.num_prefill_tokens
        most = self.most_small[num_chunked > 0]
        return 2 * (num_chunked > 0) + (most is not None and num_chunked + work.num_decode_tokens > most)


def calibrate(profile: Profile) -> Calibration | None:
    """Compare a profile with its checks; None where these are too few.

    Stages are taken together, so how layers were dealt does not matter.
    """
    if len(profile.checks) < MIN_CHECKS:
        return None
    gpu = GPUS[profile.gpu] if profile.gpu else next(iter(GPUS.values()))  # matters only beyond the tables
    parallel = Parallel(tp=profile.parallel.tp, ep=profile.parallel.ep)
    cost = Profiled(profile=profile, shape=profile.shape, gpu=gpu, parallel=parallel)
    errors: list[Errors] = []
    most_small: list[int | None] = []
    for kind, has_chunks in (("decodes alone", False), ("with chunks", True)):
        checks = [check for check in profile.checks if (check.work.num_prefill_tokens > 0) == has_chunks]
        most = _most_small(checks)
        small = [check for check in checks if most is None or _num_tokens(check) <= most]
        large = [check for check in checks if most is None or _num_tokens(check) > most]
        for name, chosen in ((f"{kind}, small", small), (f"{kind}, large", large)):
            ratios = _ratios(cost, chosen if len(checks) >= MIN_CHECKS else profile.checks)
            errors.append(Errors(kind=kind if most is None else name, ratios=ratios))
        most_small.append(most)
    return Calibration(errors=tuple(errors), most_small=(most_small[0], most_small[1]))


def _most_small(checks: Sequence[MeasuredStep]) -> int | None:
    """Tokens of the largest step of the smaller half; None if halves would be too few."""
    tokens = sorted(map(_num_tokens, checks))
    if len(tokens) < 2 * _MIN_HALF:
        return None
    most = tokens[len(tokens) // 2 - 1]
    return most if tokens.count(most) + tokens.index(most) <= len(tokens) - _MIN_HALF else None


def _num_tokens(check: MeasuredStep) -> int:
    return check.work.num_prefill_tokens + check.work.num_decode_tokens


def _ratios(cost: CostModel, checks: Sequence[MeasuredStep]) -> tuple[float, ...]:
    return tuple(sum(check.stage_ns) / cost.stage_ns(check.work)[0] for check in checks)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


class ReplicaCost:
    """A cost model that is off as the hardware may be: equal numbers and seeds make equal ones, on any machine."""

    def __init__(self, cost: CostModel, calibration: Calibration, *, seed: int, number: int) -> None:
        self.num_stages, self.host_ns, self.return_ns = cost.num_stages, cost.host_ns, cost.return_ns
        self.transfer_ns, self.gap_ns, self.clock = cost.transfer_ns, cost.gap_ns, cost.clock
        self.intake_ns = cost.intake_ns
        self._cost, self._class_of = cost, calibration.class_of
        self._name = f"{seed} {number}"
        self._own = [_deviations(errors.ratios) for errors in calibration.errors]
        share, machine = self._draw_run()
        self._common = [
            1.0 + share * (self._draw_common(kind, errors) - 1.0) + machine
            for kind, errors in enumerate(calibration.errors)
        ]
        self._factors: dict[tuple[int, ...], float] = {}

    def stage_ns(self, work: Work) -> Sequence[int]:
        """How long each stage computes."""
        factor = self._factor(work)
        return [int(time_ns * factor) for time_ns in self._cost.stage_ns(work)]

    def load(self, work: Work) -> Load | None:
        """`stage_ns` and what its clock stretches of it, all off alike; None without a clock."""
        load = self._cost.load(work)
        if load is None:
            return None
        factor = self._factor(work)
        return Load(
            [int(time_ns * factor) for time_ns in load.stage_ns],
            [time_ns * factor for time_ns in load.stretched_ns],
            load.power,
        )

    def components(self, work: Work) -> Mapping[str, Sequence[float]]:
        """Split `stage_ns` by component, all off alike."""
        factor = self._factor(work)
        return {name: [time_ns * factor for time_ns in row] for name, row in self._cost.components(work).items()}

    def _factor(self, work: Work) -> float:
        """Times the prediction; equal in a neighbourhood, so that the same work costs the same."""
        key = (
            self._class_of(work),
            work.num_prefill_tokens.bit_length(),
            work.num_decode_tokens.bit_length(),
            work.prefill_context.bit_length(),
            work.decode_context.bit_length(),
        )
        factor = self._factors.get(key)
        if factor is None:
            factor = self._factors[key] = max(self._common[key[0]] + self._draw_own(key), _LEAST)
        return factor

    def _draw_run(self) -> tuple[float, float]:
        """How much of the common errors this run's steps have, and how far its machine is from the profile's."""
        random = Random(f"{self._name} run")
        way = random.random()
        return way * way * (3.0 - 2.0 * way), MACHINES * (2.0 * random.random() - 1.0)

    def _draw_common(self, kind: int, errors: Errors) -> float:
        """The mean of as many draws as there are ratios."""
        deviations, random = self._own[kind], Random(f"{self._name} {kind}")
        draws = [deviations[int(random.random() * len(deviations))] for _ in deviations]
        return errors.mean + _mean(draws)

    def _draw_own(self, key: tuple[int, ...]) -> float:
        """From a generator of the neighbourhood's own, so that it does not matter which comes first."""
        deviations = self._own[key[0]]
        return deviations[int(Random(f"{self._name} {key}").random() * len(deviations))]


def _deviations(ratios: Sequence[float]) -> list[float]:
    """From the mean; widened, for ratios lie closer to their own mean than to the true one."""
    mean, widening = _mean(ratios), sqrt(len(ratios) / (len(ratios) - 1))
    return [(ratio - mean) * widening for ratio in ratios]
