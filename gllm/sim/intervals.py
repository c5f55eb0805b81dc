"""Prediction intervals: where each measure of a run is expected on the hardware, by a profile's own checks.

The run is simulated again, by so many replicas of the cost model, each off as the hardware may be
(`gllm.sim.calibration`). An interval of 90 % leaves one measured run in twenty below it and one above.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gllm.console.progress import show_progress
from gllm.sim.calibration import MIN_CHECKS, ReplicaCost, calibrate
from gllm.sim.options import LEAST_REPLICAS
from gllm.sim.processes import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gllm.sim.calibration import Calibration
    from gllm.sim.config import Setup
    from gllm.sim.cost import CostModel

    Measures = dict[str, float]
    """Numbers of a summary by dotted name: ttft_s.p99, stages.0.busy_s."""

    Simulate = Callable[[CostModel], Mapping[str, Any]]
    """A run's summary under a cost model; it must pickle."""

_TAIL = 0.05
_MOST_BY_PROCESS = 5
_GIVEN = frozenset({"config", "wall_s", "slo_ttft_s", "slo_tpot_s"})
"""What a summary holds that no cost model has a say in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """Of each measure that has a value in all replicas, the interval that it is expected in."""

    num_replicas: int
    seed: int
    calibration: Calibration
    measures: Mapping[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """As `report.json` holds them."""
        return {
            "level": 1 - 2 * _TAIL,
            "num_replicas": self.num_replicas,
            "seed": self.seed,
            "checks": self.calibration.to_json(),
            "measures": {name: list(pair) for name, pair in self.measures.items()},
        }


def calibration_of(setup: Setup) -> Calibration:
    """What there is to take intervals from.

    Raises:
        ValueError: One line: it is nothing, or too little.
    """
    profile = setup.profile
    if profile is None:
        raise ValueError("--intervals: a roofline has no measured steps to take them from; name a profile by --profile")
    found = calibrate(profile)
    if found is None:
        raise ValueError(
            f"--intervals: profile {profile.name} holds {len(profile.checks)} steps measured as a check, "
            f"of which {MIN_CHECKS} are needed; measure it again"
        )
    return found


def predict_intervals(
    simulate: Simulate,
    cost: CostModel,
    calibration: Calibration,
    *,
    num_replicas: int,
    seed: int = 0,
    num_processes: int = 1,
    quiet: bool = True,
) -> Intervals:
    """Simulate all replicas, in as many processes at once; one works in this process.

    Raises:
        ValueError: A replica failed: why.
    """
    size = min(-(-num_replicas // num_processes), _MOST_BY_PROCESS)
    starts = range(0, num_replicas, size)
    batches = [
        Replicas(
            simulate=simulate,
            cost=cost,
            calibration=calibration,
            seed=seed,
            numbers=range(start, min(start + size, num_replicas)),
        )
        for start in starts
    ]
    ended: list[str] = []
    watch = show_progress(num_replicas, lambda: min(len(ended) * size, num_replicas), what="replicas")
    with nullcontext() if quiet else watch:
        found = list(_measured(batches, num_processes, ended))
    return Intervals(num_replicas=num_replicas, seed=seed, calibration=calibration, measures=_intervals(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Some replicas, as a process is sent them."""

    simulate: Simulate
    cost: CostModel
    calibration: Calibration
    seed: int
    numbers: range

    @property
    def name(self) -> str:
        """As an error names them."""
        return f"replicas {self.numbers[0]} to {self.numbers[-1]}"

    def run(self) -> dict[str, Measures]:
        """The measures of each."""
        found = {}
        for number in self.numbers:
            cost = ReplicaCost(self.cost, self.calibration, seed=self.seed, number=number)
            found[str(number)] = dict(_numbers(self.simulate(cost)))
        return found


def _measured(batches: Sequence[Replicas], num_processes: int, ended: list[str]) -> Iterator[Measures]:
    """The measures of all replicas, in their order."""
    if num_processes == 1:
        for batch in batches:
            yield from batch.run().values()
            ended.append(batch.name)
        return
    for name, outcome in run_all(batches, num_processes, ended).items():
        if isinstance(outcome, str):
            raise ValueError(f"prediction intervals: {name}: {outcome}")  # noqa: TRY004 - the line that its process sent
        yield from outcome.values()


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:  # noqa: ANN401 - any JSON value
    """A summary's numbers by dotted name."""
    if isinstance(value, (int, float)):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in _GIVEN:
                yield from _numbers(item, f"{name}.{key}" if name else str(key))


def _intervals(replicas: Sequence[Measures]) -> dict[str, tuple[float, float]]:
    names = [name for name in replicas[0] if all(name in each for each in replicas)]
    return {name: interval([each[name] for each in replicas]) for name in names}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more draw of the same falls in 9 of 10 cases: of 19 values, between the least and the largest.

    The k-th least of n leaves k / (n + 1) of further draws below itself; between two values it is linear.
    """
    assert len(values) >= LEAST_REPLICAS
    position = _TAIL * (len(values) + 1) - 1
    index = int(position)
    part, ordered = position - index, sorted(values)

    def at(one: float, next_one: float) -> float:
        return one + (next_one - one) * part if part else one

    return at(ordered[index], ordered[index + 1]), at(ordered[-1 - index], ordered[-2 - index])
