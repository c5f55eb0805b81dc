"""The simulator's shell: simpy makes time pass, the engine decides, the pipeline takes its time.

It knows what the core must not: each request's true output length. A decode group carries the steps
at which its members will stop, so a micro-batch that merely goes on costs one look-up.
"""

from __future__ import annotations

from array import array
from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import simpy

from gllm.core import NEVER, Request, StepResult, Stopped
from gllm.sim.pipeline import WAKE, Instant, recurrence

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from gllm.core import DecodeGroup, Engine, Plan
    from gllm.report.decision_log import DecisionLog
    from gllm.report.recorder import Recorder
    from gllm.sim.cost import CostModel
    from gllm.sim.pipeline import MakePipeline


class Arrival(NamedTuple):
    """A request and the number of tokens it will turn out to want."""

    request: Request
    num_output_tokens: int


Flight = tuple["Plan", "Sequence[int]", "Sequence[int]", "list[Stopped]", int, tuple[int, int]]
"""A batch on the road: plan, cost and end of each stage, who stops with it, when planned, (waiting, running) then."""

_LAST_STEP = -1
"""Where a decode group's notes hold, by member, the step with which it reaches its true length."""


class Script(Protocol):
    """What a recorded run prescribes where a simulation would find it out by itself."""

    @property
    def aborts(self) -> Iterable[tuple[int, Sequence[int]]]:
        """When requests are aborted and which, in order of time."""

    def due_ns(self, arrival: Arrival) -> int:
        """When the engine is told of a request; `Request.arrival_ns` may be earlier."""

    def amend(self, plan: int, stopped: list[Stopped]) -> None:
        """Bring who stops with a plan that is back into the recorded order, and add what only a real worker knows."""

    def wake_ns(self, until_ns: int) -> int | None:
        """When a policy that waits until `until_ns` is asked again; None: something else happens before."""


class Simulation:
    """Plays arrivals (sorted by time, their ids 0, 1, 2, ...) against an engine in virtual time.

    `pipeline` makes the pipeline: the recurrence, or one process per stage. With a `script`
    (and a pipeline to match) the times are those of a recorded run.
    """

    def __init__(  # noqa: PLR0917 - a run's parts, in the order in which they meet
        self,
        engine: Engine,
        arrivals: Iterable[Arrival],
        cost: CostModel,
        recorder: Recorder,
        log: DecisionLog | None = None,
        pipeline: MakePipeline = recurrence,
        script: Script | None = None,
    ) -> None:
        self.env = simpy.Environment()
        self.engine = engine
        self._view = engine.view
        self._host_ns, self._return_ns = cost.host_ns, cost.return_ns
        # Bound once: these are called for every micro-batch.
        self._stage_ns, self._transfer_ns, self._gap_ns = cost.stage_ns, cost.transfer_ns, cost.gap_ns
        self._load = None if cost.clock is None else cost.load
        self._recorder = recorder
        self._log = log
        limits = engine.limits
        self._looks_ahead = limits.max_in_flight > limits.depth
        memory = limits.max_in_flight if self._looks_ahead else 0
        self._flights: deque[Flight] = deque()
        self._until_ns: int | None = None  # when the policy is to be asked again, as of the last turn
        self._news = False  # whether there is anything in the next two
        self._pending: list[Request] = []
        self._aborts: list[int] = []
        self._true_length = array("q")  # by request id
        self._script = script
        done = self._return if script is None else self._return_amended
        self._submit = pipeline(self.env, cost.num_stages, memory, done, cost.clock).submit
        self._intake_ns = cost.intake_ns
        self.env.process(self._arrive(arrivals, self._due_ns if script is None else script.due_ns))
        if script is not None:
            self.env.process(self._abort(script.aborts))

    def run(self) -> None:
        """Until every request has ended."""
        self.env.run()
        assert not self.engine.num_unfinished, "the simulation ran out of events with requests unfinished"

    def _due_ns(self, arrival: Arrival) -> int:
        return arrival.request.arrival_ns + self._intake_ns

    def _arrive(
        self, arrivals: Iterable[Arrival], due_ns: Callable[[Arrival], int]
    ) -> Generator[simpy.Event, Any, None]:
        env = self.env
        for time, group in groupby(arrivals, key=due_ns):
            if time > env.now:
                yield env.timeout(time - env.now)
            for arrival in group:
                self._true_length.append(arrival.num_output_tokens)
                self._pending.append(arrival.request)
            self._news = True
            # With a full pipeline nothing can be planned: the next result's turn takes them in.
            if len(self._flights) < self.engine.limits.max_in_flight:
                Instant(env, time, WAKE, self._wake)

    def _abort(self, aborts: Iterable[tuple[int, Sequence[int]]]) -> Generator[simpy.Event, Any, None]:
        """Aborts do not wait for a free place: they free cache, and may end a request that arrives with them."""
        env = self.env
        for time, request_ids in aborts:
            if time > env.now:
                yield env.timeout(time - env.now)
            self._aborts += request_ids
            self._news = True
            Instant(env, time, WAKE, self._wake)

    def _wake(self, instant: Instant) -> None:
        if self._news:
            self._turn(instant.at, ())

    def _ask_again(self, instant: Instant) -> None:
        """The policy asked to be woken now, whatever is on the road; if it was asked since, that is void."""
        if instant.at == self._until_ns:
            self._turn(instant.at, ())

    def _return(self, _: simpy.Event) -> None:
        plan, costs, ends, stopped, dispatched, queue = self._flights.popleft()
        now = ends[-1] + self._return_ns
        self._turn(now, (StepResult(plan.id, stopped),))
        self._recorder.batch(plan, dispatched, queue, now, ends, costs)

    def _return_amended(self, event: simpy.Event) -> None:
        """A result with what the script knows of it."""
        assert self._script is not None
        plan, _, _, stopped, _, _ = self._flights[0]
        self._script.amend(plan.id, stopped)
        self._return(event)

    def _turn(self, now: int, results: tuple[StepResult, ...]) -> None:
        arrived: Sequence[Request] = ()
        aborts: Sequence[int] = ()
        if self._news:
            arrived, aborts = self._take_news()
        turn = self.engine.turn(results, arrived, aborts, now=now)
        if turn.events:
            self._recorder.events(now, turn.events)
        if self._log is not None:
            self._log.write(now, results, arrived, aborts, turn)
        for plan in turn.plans:
            self._dispatch(plan, now)
        until_ns = self._until_ns = turn.wait.until_ns
        if until_ns is not None:
            self._wake_later(until_ns)

    def _take_news(self) -> tuple[list[Request], list[int]]:
        arrived, self._pending = self._pending, []
        aborts, self._aborts = self._aborts, []
        self._news = False
        self._recorder.submit(arrived)
        return arrived, aborts

    def _wake_later(self, until_ns: int) -> None:
        at = until_ns if self._script is None else self._script.wake_ns(until_ns)
        self._until_ns = at
        if at is not None:
            Instant(self.env, at, WAKE, self._ask_again)

    def _dispatch(self, plan: Plan, now: int) -> None:
        view = self._view
        load = None if self._load is None else self._load(plan)
        costs = self._stage_ns(plan) if load is None else load.stage_ns
        after = plan.depends_on if self._looks_ahead else NEVER  # else its tokens are back already
        ready, transfer, gap = now + self._host_ns, self._transfer_ns(plan), self._gap_ns(plan)
        ends = self._submit(ready, costs, transfer, gap, self._return_ns, after, load)
        stopped: list[Stopped] = []
        self._flights.append((plan, costs, ends, stopped, now, (view.num_waiting, view.num_running)))
        for sequence in plan.prefilled:
            num_output_tokens = sequence.target + 1 - sequence.num_prompt_tokens
            if num_output_tokens >= self._true_length[sequence.id] and sequence.num_tokens < sequence.limit:
                stopped.append(Stopped(sequence.id))  # at its limit the engine ends it
        group = plan.group
        if group is not None:
            if plan.left or plan.joined:
                self._watch(plan, group)
            if plan.step in group.notes:
                last = group.notes[_LAST_STEP]
                stopped += [Stopped(member) for member in group.notes.pop(plan.step) if last.get(member) == plan.step]

    def _watch(self, plan: Plan, group: DecodeGroup) -> None:
        """Note at which step of the group its new members will stop, and forget those that left.

        Who is a member is what the plans say: the engine may have moved a sequence on before this plan is seen here.
        """
        notes = group.notes
        last: dict[int, int] = notes.setdefault(_LAST_STEP, {})
        for gone in plan.left:
            last.pop(gone, None)
        for joined in plan.joined:
            sequence = joined.sequence
            left = self._true_length[sequence.id] - joined.num_output_tokens
            if left > 0:
                last[sequence.id] = step = plan.step + left - 1
                notes.setdefault(step, []).append(sequence.id)
            else:  # planned ahead: it stops with its previous step, which is still on the road
                stopped = self._flights[joined.previous - self._flights[0][0].id][3]
                if all(entry.id != sequence.id for entry in stopped):
                    stopped.append(Stopped(sequence.id))
