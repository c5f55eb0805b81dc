"""Steps on their way through real workers, and when each stage computed them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gllm.runtime.messages import StageTime, StepDone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.runtime.messages import Report, Step


class Workers(Protocol):
    """Who computes."""

    def dispatch(self, step: Step) -> None:
        """Send a step to every worker."""

    def await_report(self) -> Report:
        """The next report, however long it takes."""


class Stamps(NamedTuple):
    """When one stage computed a step, in ns."""

    start_ns: int
    head_ns: int  # the layers' end
    end_ns: int


class Session:
    """Sends steps and hears of them. Steps are numbered on from one call to the next."""

    def __init__(self, workers: Workers, *, num_stages: int, max_in_flight: int) -> None:
        self._workers, self._num_stages, self._max_in_flight = workers, num_stages, max_in_flight

    def rest(self, seconds: float) -> None:
        """Let the GPUs cool down."""
        time.sleep(seconds)

    def run(self, steps: Sequence[Step], *, max_in_flight: int | None = None) -> list[tuple[Stamps, ...]]:
        """Have steps computed, so many on the road at once (by default the engine's number); their times by stage."""
        most = self._max_in_flight if max_in_flight is None else max_in_flight
        times: dict[int, dict[int, Stamps]] = {step.plan: {} for step in steps}
        num_sent = num_done = num_times = 0
        while num_done < len(steps) or num_times < len(steps) * self._num_stages:
            for step in steps[num_sent : num_done + most]:
                self._workers.dispatch(step)
                num_sent += 1
            report = self._workers.await_report()
            if isinstance(report, StepDone):
                num_done += 1
            elif isinstance(report, StageTime):
                times[report.plan][report.stage] = Stamps(report.start_ns, report.head_ns, report.end_ns)
                num_times += 1
        return [tuple(times[step.plan][stage] for stage in range(self._num_stages)) for step in steps]
