"""The simulator's shell on a recorded run's times: what happens comes from the record, what is decided does not.

From the record come when the engine is told of each request, of aborts, of each result and of a
policy's time; which sequences fail; and in which order a result names those that stop. Who stops with
which micro-batch the shell works out itself from true lengths, as in any simulation, and when turns
are taken is its own rule. An engine's loop on real workers keeps the same rules, else the logs part:

- each turn has a time of its own, later than the last one's, and at most one result;
- with a full pipeline arrivals wait for the next result's turn, since nothing could be planned;
- aborts are taken at once, full pipeline or not: with the result of that moment, else in a turn of
  their own. Requests that are to be told before (an abort may be of one of them) come with that turn;
- only the last turn's `Wait` counts: what a policy asked to be woken for is void once anything happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from gllm.core import Engine, PlanError, StallError, Stopped
from gllm.report.decision_log import DecisionLog, decision_line
from gllm.report.recorder import Recorder
from gllm.sim.cost import COMPONENTS
from gllm.sim.driver import Simulation
from gllm.sim.pipeline import RESULT, Instant
from gllm.sim.recording import Moment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import simpy

    from gllm.core import Plan, Request, StepResult, Turn
    from gllm.gpu_clock import GpuClock
    from gllm.sim.cost import Load, Work
    from gllm.sim.driver import Arrival
    from gllm.sim.pipeline import Done
    from gllm.sim.recording import Recording


class Replica(NamedTuple):
    """What a simulation on recorded times came to; it ends with the first turn that is not as recorded."""

    sha256: str
    num_turns: int
    failure: str | None  # what the simulated engine raised, if it did


def simulate_recording(recording: Recording, log_path: Path, watch: Callable[[Plan], object] | None = None) -> Replica:
    """Play a recording's happenings to a fresh engine; write its decision log. `watch` is shown each plan."""
    engine = Engine(recording.policy, recording.limits, keep_snapshots=recording.has_views)
    script = RecordedScript(recording)
    cost, failure = _NoCost(watch), None

    def pipeline(
        env: simpy.Environment,
        num_stages: int,  # noqa: ARG001
        memory: int,  # noqa: ARG001
        done: Done,
        clock: GpuClock | None,  # noqa: ARG001
    ) -> RecordedPipeline:
        return RecordedPipeline(env, recording.returns_ns, done)

    with CheckedLog(log_path, script) as log:
        recorder = Recorder(cost.num_stages)
        simulation = Simulation(engine, recording.arrivals, cost, recorder, log, pipeline, script)
        try:
            simulation.env.run()  # to the end of the record: requests may be left
        except PartedError:
            pass  # the log shows where
        except (PlanError, StallError) as error:
            failure = str(error)
    return Replica(log.sha256, script.num_turns, failure)


class RecordedPipeline:
    """Each result is back when the recorded one was; those that the log ends before never are."""

    def __init__(self, env: simpy.Environment, returns_ns: Sequence[int], done: Done) -> None:
        self._env, self._done = env, done
        self._returns_ns = returns_ns
        self._count = 0

    def submit(  # noqa: PLR0917 - as the pipelines have it
        self,
        ready_ns: int,  # noqa: ARG002
        costs_ns: Sequence[int],  # noqa: ARG002
        transfer_ns: int,  # noqa: ARG002
        gap_ns: int,  # noqa: ARG002
        return_ns: int,  # noqa: ARG002
        after: int,  # noqa: ARG002
        load: Load | None,  # noqa: ARG002
    ) -> Sequence[int]:
        """Enter the next micro-batch."""
        ends = self._returns_ns[self._count : self._count + 1]
        self._count += 1
        if ends:
            Instant(self._env, ends[0], RESULT, self._done)
        return ends


class RecordedScript:
    """The driver's `Script` of a recording; counts the turns, and sees that each is the recorded one."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.num_turns = 0

    @property
    def aborts(self) -> Iterator[tuple[int, Sequence[int]]]:
        """When requests are aborted and which."""
        return ((moment.now_ns, moment.aborted) for moment in self._recording.moments if moment.aborted)

    def due_ns(self, arrival: Arrival) -> int:
        """When the recorded engine was told of it."""
        return self._recording.due_ns[arrival.request.id]

    def amend(self, plan: int, stopped: list[Stopped]) -> None:
        """Errors and what concerns nobody any more from the record; its order; hashes of whole outputs."""
        found = {entry.id: entry for entry in stopped}
        hashes = self._recording.stop_hashes
        amended = []
        for key, reason, given in self._recording.told[plan]:
            if found.pop(key, None) is not None or given:
                amended.append(Stopped(key, reason, hashes[key] if 0 <= key < len(hashes) else ()))
        stopped[:] = [*amended, *found.values()]

    def wake_ns(self, until_ns: int) -> int | None:  # noqa: ARG002 - the recorded loop may have been late, or early
        """When the recorded engine asked its policy again, unless something happened before."""
        moment = self._moment(self.num_turns)
        return moment.now_ns if moment is not None and moment.is_empty else None

    def check(self, moment: Moment) -> None:
        """See that the turn just taken is the recorded one.

        Raises:
            PartedError: It is not, so that the rest of the record does not concern it.
        """
        recorded = self._moment(self.num_turns)
        self.num_turns += 1
        if moment != recorded:
            raise PartedError

    def _moment(self, number: int) -> Moment | None:
        moments = self._recording.moments
        return moments[number] if number < len(moments) else None


class PartedError(Exception):
    """A simulated turn is not the recorded one."""


class CheckedLog(DecisionLog):
    """A decision log that ends a simulation after the first turn that is not as recorded."""

    def __init__(self, path: Path, script: RecordedScript) -> None:
        super().__init__(path)
        self._script = script

    def write(
        self,
        now: int,
        results: Iterable[StepResult],
        requests: Iterable[Request],
        aborts: Iterable[int],
        turn: Turn,
    ) -> None:
        """Note one turn, right after it was taken; then compare it."""
        super().write(now, results, requests, aborts, turn)
        plan = next((result.plan for result in results), None)
        decisions = hash(tuple(map(decision_line, turn.plans)))
        arrived = tuple(request.id for request in requests)
        self._script.check(Moment(now, plan, arrived, tuple(aborts), decisions))


class _NoCost:
    """A cost model of one stage that takes no time: results have times of their own."""

    num_stages, intake_ns, host_ns, return_ns, clock = 1, 0, 0, 0, None

    def __init__(self, watch: Callable[[Plan], object] | None) -> None:
        self._watch = watch

    def stage_ns(self, work: Work) -> Sequence[int]:
        if self._watch is not None:
            self._watch(cast("Plan", work))  # a driver asks once for each plan, in order
        return (0,)

    def load(self, work: Work) -> None:
        """Nothing."""

    def transfer_ns(self, work: Work) -> int:  # noqa: ARG002
        return 0

    def gap_ns(self, work: Work) -> int:  # noqa: ARG002
        return 0

    def components(self, work: Work) -> Mapping[str, Sequence[float]]:  # noqa: ARG002
        return dict.fromkeys(COMPONENTS, (0.0,))
