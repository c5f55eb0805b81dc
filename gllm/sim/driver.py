"""The simulator's shell: simpy makes time pass, the engine decides, the pipeline takes its time.

It knows what the core must not: each request's true output length. A decode group carries the steps
at which its members will stop, so a micro-batch that merely goes on costs one look-up.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import simpy

from gllm.core import Finished, Rejected, StepResult, Stopped
from gllm.sim.pipeline import WAKE, Instant, RecurrencePipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from gllm.core import DecodeGroup, Engine, Plan, Request, Sequence, Turn
    from gllm.report.decision_log import DecisionLog
    from gllm.report.recorder import Recorder
    from gllm.sim.cost import CostModel
    from gllm.sim.pipeline import Pipeline


class Arrival(NamedTuple):
    """A request and the number of tokens it will turn out to want."""

    request: Request
    num_output_tokens: int


Flight = tuple["Plan", "Sequence[int]", "list[Stopped]", int, tuple[int, int]]
"""A batch on the road: plan, cost of each stage, who stops with it, when it was planned, (waiting, running) then."""


class Simulation:
    """Plays arrivals (sorted by time) against an engine in virtual time.

    `pipeline` is the class of the pipeline: the recurrence, or one process per stage.
    """

    def __init__(
        self,
        engine: Engine,
        arrivals: Iterable[Arrival],
        cost: CostModel,
        recorder: Recorder,
        log: DecisionLog | None = None,
        pipeline: Callable[[simpy.Environment, int, int], Pipeline] = RecurrencePipeline,
    ) -> None:
        self.env = simpy.Environment()
        self.engine = engine
        self._view = engine.view
        self._cost = cost
        self._recorder = recorder
        self._log = log
        self._pipeline = pipeline(self.env, cost.num_stages, engine.limits.max_in_flight + 1)
        self._looks_ahead = engine.limits.max_in_flight > engine.limits.depth
        self._flights: deque[Flight] = deque()
        self._pending: list[Request] = []
        self._true_length: dict[int, int] = {}
        self.env.process(self._arrive(arrivals))

    def run(self) -> None:
        """Until every request has ended."""
        self.env.run()
        assert not self.engine.num_unfinished, "the simulation ran out of events with requests unfinished"

    def _arrive(self, arrivals: Iterable[Arrival]) -> Generator[simpy.Event, Any, None]:
        env = self.env
        for time, group in groupby(arrivals, key=lambda arrival: arrival.request.arrival_ns):
            if time > env.now:
                yield env.timeout(time - env.now)
            for arrival in group:
                self._true_length[arrival.request.id] = arrival.num_output_tokens
                self._pending.append(arrival.request)
            # With a full pipeline nothing can be planned: the next result's turn takes them in.
            if len(self._flights) < self.engine.limits.max_in_flight:
                Instant(env, env.now, WAKE, self._wake)

    def _wake(self, instant: Instant) -> None:
        if self._pending or not self._flights:
            self._turn(instant.at, ())

    def _return(self, instant: Instant) -> None:
        plan, costs, stopped, dispatched, queue = self._flights.popleft()
        now = instant.at
        self._turn(now, (StepResult(plan.id, stopped),))
        self._recorder.batch(plan, dispatched, queue, now, instant.note, costs)

    def _turn(self, now: int, results: tuple[StepResult, ...]) -> None:
        arrived = self._pending
        if arrived:
            self._pending = []
            self._recorder.submit(arrived)
        turn = self.engine.turn(results, arrived, now=now)
        if turn.events:
            self._recorder.events(now, turn.events)
            self._forget(turn)
        if self._log is not None:
            self._log.write(now, results, arrived, (), turn)
        for plan in turn.plans:
            self._dispatch(plan, now)
        if turn.wait.until_ns is not None:
            Instant(self.env, turn.wait.until_ns, WAKE, self._wake)

    def _forget(self, turn: Turn) -> None:
        for event in turn.events:
            if type(event) is Finished or type(event) is Rejected:
                del self._true_length[event.id]

    def _dispatch(self, plan: Plan, now: int) -> None:
        cost, view = self._cost, self._view
        costs = cost.stage_ns(plan)
        stopped: list[Stopped] = []
        self._flights.append((plan, costs, stopped, now, (view.num_waiting, view.num_running)))
        after = plan.depends_on if self._looks_ahead else -1  # else its tokens are back already
        self._pipeline.submit(now + cost.host_ns, costs, cost.transfer_ns(plan), cost.return_ns, after, self._return)
        for sequence in plan.prefilled:
            if sequence.target + 1 - sequence.num_prompt_tokens >= self._true_length[sequence.id]:
                stopped.append(Stopped(sequence.id))
        group = plan.group
        if group is not None:
            if plan.joined:
                self._watch(plan, group)
            step = plan.step
            if step in group.notes:
                due = group.notes.pop(step)
                stopped += [Stopped(s.id) for s in due if s.group is group and self._completes(s, step)]

    def _completes(self, sequence: Sequence, step: int) -> bool:
        """Whether a member reaches its true length at this step; entries of those that moved on do not."""
        return sequence.offset + step + 1 - sequence.num_prompt_tokens == self._true_length.get(sequence.id)

    def _watch(self, plan: Plan, group: DecodeGroup) -> None:
        """Note at which step of the group its new members will stop."""
        notes = group.notes
        for sequence, previous, num_output_tokens in plan.joined:
            left = self._true_length[sequence.id] - num_output_tokens
            if left > 0:
                notes.setdefault(plan.step + left - 1, []).append(sequence)
            else:  # planned ahead: it stops with its previous step, which is still on the road
                stopped = self._flights[previous - self._flights[0][0].id][2]
                if all(entry.id != sequence.id for entry in stopped):
                    stopped.append(Stopped(sequence.id))
