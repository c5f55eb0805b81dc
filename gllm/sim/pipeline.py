"""A pipeline of FIFO stages under simpy, twice: as a recurrence, and as one process per stage.

The recurrence is exact for FIFO stages and costs one event a micro-batch:

    start[k][s] = max(end[k][s-1] + transfer[k], end[k-1][s] + gap[k])
    end[k][s]   = start[k][s] + cost[k][s]

Where stages have clocks (`gllm.gpu_clock`), cost[k][s] depends on start[k][s] and on what the stage computed before;
the recurrence goes on to be exact, for it meets each stage's micro-batches in their order.

The process-per-stage pipeline says the same thing in simpy's words. It is slower and stays as the
reference: a test holds the two equal, event for event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappush
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import simpy

from gllm.gpu_clock import StageClock

if TYPE_CHECKING:
    from collections.abc import Generator

    from gllm.gpu_clock import GpuClock
    from gllm.sim.cost import Load

RESULT: Final = 2
WAKE: Final = 3
"""simpy priorities below NORMAL (1): an instant's arrivals first, then its results, then what is left to decide."""

_NEVER: Final = -(1 << 62)
"""When a stage that has computed nothing yet ended its last micro-batch."""


class Instant(simpy.Event):
    """One callback at time `at`, after everything of that instant with a smaller `priority`.

    Set up as simpy's own `Timeout` is, which has no priority.
    """

    def __init__(self, env: simpy.Environment, at: int, priority: int, callback: Callable[[Instant], None]) -> None:
        self.env = env
        self.callbacks = [callback]
        self._ok = True
        self._value = None
        self.at = at
        env.schedule(self, priority, at - env.now)  # type: ignore[arg-type]  # any int orders; simpy names two


Done = Callable[["simpy.Event"], None]
"""Called for each micro-batch, in order, at the end of the instant its result is back at the engine."""


class Pipeline(Protocol):
    """Takes micro-batches 0, 1, 2, ... and is done with each `return_ns` after its last stage has ended."""

    def submit(  # noqa: PLR0917 - called for every micro-batch, where names cost
        self,
        ready_ns: int,
        costs_ns: Sequence[int],
        transfer_ns: int,
        gap_ns: int,
        return_ns: int,
        after: int,
        load: Load | None,
    ) -> Sequence[int]:
        """Enter the next micro-batch; return when each stage ends it, complete when its result is back.

        Args:
            ready_ns: stage 0 may start then.
            costs_ns: how long each stage computes.
            transfer_ns: from one stage to the next.
            gap_ns: each stage needs between its last micro-batch and this one.
            return_ns: from the last stage back to the engine.
            after: the batch whose sampled tokens stage 0 needs, if it may still be on the road; else -1. With one
                stage they are on its GPU already, with more they come back by way of the engine.
            load: for stages with clocks; `costs_ns` is its list then, and has in it how long each stage took when the
                result is back.
        """


MakePipeline = Callable[[simpy.Environment, int, int, Done, "GpuClock | None"], Pipeline]
"""Of so many stages, whose `after` reaches back so far, and with such clocks, if any."""


def recurrence(env: simpy.Environment, num_stages: int, memory: int, done: Done, clock: GpuClock | None) -> Pipeline:
    """The recurrence; with a clock in each stage, if there is one: what has none does not pay for it."""
    if clock is None:
        return RecurrencePipeline(env, num_stages, memory, done)
    return ClockedPipeline(env, num_stages, memory, done, clock)


class RecurrencePipeline:
    """The max-plus recurrence; one simpy event a micro-batch. `after` reaches back `memory` batches.

    Results come back in order, so a single event object stands for all of them: it goes into simpy's queue once for
    each.
    """

    def __init__(self, env: simpy.Environment, num_stages: int, memory: int, done: Done) -> None:
        self._queue, self._event_ids = env._queue, env._eid  # noqa: SLF001 - as `Environment.schedule` uses them
        self._exit = env.event()
        self._exit._ok = True  # noqa: SLF001
        self._callbacks = self._exit.callbacks = [self._rearm, done]
        self._ends: Sequence[int] = [_NEVER] * num_stages
        self._memory = memory
        self._exits: deque[int] = deque(maxlen=memory)
        self._count = 0

    def submit(  # noqa: PLR0917
        self,
        ready_ns: int,
        costs_ns: Sequence[int],
        transfer_ns: int,
        gap_ns: int,
        return_ns: int,
        after: int,
        load: Load | None,  # noqa: ARG002 - there are no clocks
    ) -> Sequence[int]:
        """Enter the next micro-batch."""
        time = ready_ns
        if after >= 0 and after >= self._count - len(self._exits):
            time = max(time, self._exits[after - self._count] + (return_ns if len(self._ends) > 1 else 0))
        ends = []
        for cost, end in zip(costs_ns, self._ends):  # noqa: B905 - `strict` costs as much as the loop
            if end + gap_ns > time:  # noqa: PLR1730 - the hottest loop of all: a call of max() costs more than the rest
                time = end + gap_ns
            time += cost
            ends.append(time)
            time += transfer_ns
        self._ends = ends
        time -= transfer_ns
        if self._memory:
            self._count += 1
            self._exits.append(time)
        entry = (time + return_ns, RESULT, next(self._event_ids), self._exit)
        heappush(self._queue, entry)  # type: ignore[misc]  # any int orders; simpy names two
        return ends

    def _rearm(self, event: simpy.Event) -> None:
        event.callbacks = self._callbacks  # simpy takes them off what it has processed


class ClockedPipeline(RecurrencePipeline):
    """The recurrence where a stage's clock follows what it computes."""

    def __init__(self, env: simpy.Environment, num_stages: int, memory: int, done: Done, clock: GpuClock) -> None:
        super().__init__(env, num_stages, memory, done)
        self._clocks = [StageClock(clock) for _ in range(num_stages)]

    def submit(  # noqa: PLR0917
        self,
        ready_ns: int,
        costs_ns: Sequence[int],  # noqa: ARG002 - they are the load's
        transfer_ns: int,
        gap_ns: int,
        return_ns: int,
        after: int,
        load: Load | None,
    ) -> Sequence[int]:
        """Enter the next micro-batch: find out how long each stage takes for it, then go on as without clocks."""
        assert load is not None
        times_ns, power = load.stage_ns, load.power
        first_ns = self._first_ns(ready_ns, return_ns, after)
        time = first_ns
        for stage, (clock, end) in enumerate(zip(self._clocks, self._ends, strict=True)):
            start = max(time, end + gap_ns)
            cost = clock.step(start - end, times_ns[stage], load.stretched_ns[stage], power)
            times_ns[stage] = cost
            time = start + cost + transfer_ns
        return super().submit(first_ns, times_ns, transfer_ns, gap_ns, return_ns, -1, None)

    def _first_ns(self, ready_ns: int, return_ns: int, after: int) -> int:
        """When stage 0 has what it needs."""
        if after >= 0 and after >= self._count - len(self._exits):
            return max(ready_ns, self._exits[after - self._count] + (return_ns if len(self._ends) > 1 else 0))
        return ready_ns


class ProcessPipeline:
    """One simpy process per stage, joined by queues."""

    def __init__(
        self,
        env: simpy.Environment,
        num_stages: int,
        memory: int,  # noqa: ARG002 - same signature
        done: Done,
        clock: GpuClock | None,
    ) -> None:
        self._env, self._done = env, done
        self._clocks = None if clock is None else [StageClock(clock) for _ in range(num_stages)]
        self._exits: list[simpy.Event] = []
        self._queues = [simpy.Store(env) for _ in range(num_stages)]
        for stage in range(num_stages):
            env.process(self._stage(stage))

    def submit(  # noqa: PLR0917
        self,
        ready_ns: int,
        costs_ns: Sequence[int],
        transfer_ns: int,
        gap_ns: int,
        return_ns: int,
        after: int,
        load: Load | None,
    ) -> Sequence[int]:
        """Enter the next micro-batch."""
        token = self._exits[after] if after >= 0 else None
        self._exits.append(self._env.event())
        ends: list[int] = []
        self._queues[0].put(
            _Job(ready_ns, costs_ns, transfer_ns, gap_ns, return_ns, load, token, self._exits[-1], ends)
        )
        return ends

    def _stage(self, stage: int) -> Generator[simpy.Event, Any, None]:
        env, end = self._env, _NEVER
        while True:
            job: _Job = yield self._queues[stage].get()
            arrival = job.ready_ns if stage == 0 else job.ends[-1] + job.transfer_ns
            if stage == 0 and job.token is not None:
                exit_ns = yield job.token
                arrival = max(arrival, exit_ns + (job.return_ns if len(self._queues) > 1 else 0))
            yield env.timeout(max(0, arrival - env.now, end + job.gap_ns - env.now))
            if self._clocks is not None and job.load is not None:
                times_ns, stretched_ns, power = job.load
                idle_ns = int(env.now) - end
                times_ns[stage] = self._clocks[stage].step(idle_ns, times_ns[stage], stretched_ns[stage], power)
            yield env.timeout(job.costs_ns[stage])
            end = int(env.now)
            job.ends.append(end)
            if stage + 1 < len(self._queues):
                self._queues[stage + 1].put(job)
            else:
                job.exit.succeed(job.ends[-1])
                Instant(env, job.ends[-1] + job.return_ns, RESULT, self._done)


class _Job(NamedTuple):
    ready_ns: int
    costs_ns: Sequence[int]
    transfer_ns: int
    gap_ns: int
    return_ns: int
    load: Load | None
    token: simpy.Event | None
    exit: simpy.Event
    ends: list[int]
