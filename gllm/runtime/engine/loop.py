"""The engine's loop: what happened goes into `core.Engine.turn`, and what it says is carried out. Nothing else decides.

The rules that the simulator's shell has too, so that both decide alike: one result a turn, in the order of plans;
requests that arrive while the pipeline is full wait for the next turn; no two turns at the same time.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from gllm.core import Engine, Finished, Preempted, Rejected, Request, Scheduled, StepResult
from gllm.runtime.engine.hashing import extend_hashes
from gllm.runtime.engine.sequences import Flight, Sequences
from gllm.runtime.messages import Abort, EngineStats, Progress, Refused, Submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gllm.core import Event, Limits, Policy, Turn
    from gllm.runtime.engine.recording import Recording
    from gllm.runtime.engine.sequences import Live
    from gllm.runtime.messages import NewRequest, Notice, StageTime, Step, StepDone, TokenDelta

_NS_PER_MS = 1_000_000


class Workers(Protocol):
    """Whom the loop gives its steps to."""

    def dispatch(self, step: Step) -> None:
        """Send a step to every worker."""


class EngineLoop:
    """One engine, fed with commands and reports; tells news through `tell`.

    `eos_token_ids` end an answer unless its request ignores them.
    """

    def __init__(  # noqa: PLR0917 - a loop's parts, in the order in which they meet
        self,
        policy: Policy,
        limits: Limits,
        eos_token_ids: Iterable[int],
        workers: Workers,
        tell: Callable[[Notice], None],
        recording: Recording | None = None,
    ) -> None:
        self.engine = Engine(policy, limits, keep_snapshots=recording is not None and recording.keeps_log)
        self._limits = limits
        self._workers = workers
        self._tell = tell
        self._recording = recording
        self._sequences = Sequences(limits, eos_token_ids)
        self._flights: deque[Flight] = deque()
        self._results: deque[StepDone] = deque()
        self._arrived: list[NewRequest] = []
        self._aborted: list[int] = []
        self._wake_ns: int | None = None
        self._start_ns: int | None = None  # the clock's zero: the first request's arrival
        self._now = 0
        self._num_requests = 0
        self._preemptions = self._queries = self._hits = 0

    @property
    def is_idle(self) -> bool:
        """Nothing is left to do until somebody asks for something."""
        return not (self.engine.num_unfinished or self._arrived or self._aborted or self._flights)

    def command(self, command: Submit | Abort) -> None:
        """Note what the front end wants."""
        if isinstance(command, Submit):
            self._arrived += command.requests
        else:
            self._aborted += command.keys

    def done(self, result: StepDone) -> None:
        """Note a step that came back."""
        self._results.append(result)

    def stage_time(self, report: StageTime) -> None:
        """Note when a stage computed a step."""
        if self._recording is not None and self._start_ns is not None:
            self._recording.stage_time(report, self._start_ns)

    def run(self) -> None:
        """Take turns until nothing that is known calls for another."""
        while self._results:
            self._turn(self._results.popleft())
        if self._aborted or (self._arrived and len(self._flights) < self._limits.max_in_flight) or self._must_wake():
            self._turn(None)

    def timeout_ms(self) -> int | None:
        """How long nothing may happen before `run` is due again; None: for ever."""
        if self._wake_ns is None:
            return None
        return max(0, -((self._clock() - self._wake_ns) // _NS_PER_MS))

    def _must_wake(self) -> bool:
        return self._wake_ns is not None and self._clock() >= self._wake_ns

    def _clock(self) -> int:
        return time.monotonic_ns() - (self._start_ns or 0)

    def _turn(self, done: StepDone | None) -> None:
        requests = self._take_arrived()
        aborts = self._take_aborted()
        deltas: list[TokenDelta] = []
        results: tuple[StepResult, ...] = ()
        flight = None
        if done is not None:
            flight = self._flights.popleft()
            assert flight.plan.id == done.plan
            stopped, deltas = self._sequences.take(flight, done)
            results = (StepResult(done.plan, stopped),)
        if not (results or requests or aborts or self._must_wake()):
            return  # all that was asked for has ended already
        now = self._now = max(self._clock(), self._now + 1)
        turn = self.engine.turn(results, requests, aborts, now=now)
        if self._recording is not None:
            self._recording.turn(now, results, requests, aborts, turn)
            if flight is not None:
                self._recording.batch(flight, now)
        self._wake_ns = turn.wait.until_ns
        self._note(turn.events, deltas)
        self._dispatch(turn)
        if deltas or turn.events or self.is_idle:  # after an abort, too, the numbers should not be of before
            self._tell(Progress(deltas, self.stats()))

    def _take_arrived(self) -> list[Request]:
        arrived, self._arrived = self._arrived, []
        if arrived and self._start_ns is None:
            self._start_ns = arrived[0].arrival_ns
        return [self._request(asked) for asked in arrived]

    def _request(self, asked: NewRequest) -> Request:
        block_size = self._limits.block_size if self._limits.prefix_caching else 0
        own, start_ns = asked.block_hashes, self._start_ns or 0
        shared = block_size and asked.params.prompt_logprobs is None  # a cached block has no logits to tell of
        hashes = extend_hashes([], asked.prompt_token_ids, block_size) if shared and own is None else []
        request = Request(
            id=self._num_requests,
            num_prompt_tokens=len(asked.prompt_token_ids),
            arrival_ns=asked.arrival_ns - start_ns,
            max_tokens=asked.params.max_tokens,
            priority=asked.priority,
            deadline_ns=None if asked.deadline_ns is None else asked.deadline_ns - start_ns,
            block_hashes=tuple(own or () if shared and own is not None else hashes),
        )
        self._num_requests += 1
        self._sequences.add(asked, request, hashes)
        return request

    def _take_aborted(self) -> list[int]:
        keys, self._aborted = self._aborted, []
        known = self._sequences.id_of
        return [known[key] for key in keys if key in known]

    def _note(self, events: list[Event], deltas: list[TokenDelta]) -> None:
        """What the events mean for slots and for those who asked."""
        by_key = {delta.key: delta for delta in deltas} if events else {}
        for event in events:
            if isinstance(event, Finished):
                live = self._sequences.remove(event.id)
                self._finish(live, event.reason, by_key)
            elif isinstance(event, Preempted):
                self._sequences.vacate(self._sequences.by_id[event.id])
                self._preemptions += 1
            elif isinstance(event, Scheduled):
                live = self._sequences.by_id[event.id]
                live.num_cached_tokens = event.num_cached_tokens
                self._queries += len(live.asked.prompt_token_ids)
                self._hits += event.num_cached_tokens
            elif isinstance(event, Rejected):
                live = self._sequences.remove(event.id)
                self._tell(Refused(live.asked.key, event.reason))

    @staticmethod
    def _finish(live: Live, reason: str, by_key: dict[int, TokenDelta]) -> None:
        delta = by_key.get(live.asked.key)
        if delta is not None:  # else it was aborted: who asked for that knows
            delta.finish_reason = reason  # type: ignore[assignment]  # the core's words are ours
            delta.stop_token_id = live.stop_token_id

    def _dispatch(self, turn: Turn) -> None:
        if not turn.plans:
            return
        view, now = self.engine.view, self._now
        queue = view.num_waiting, view.num_running
        for plan in turn.plans:
            step, rows, chunks = self._sequences.step(plan)
            self._workers.dispatch(step)
            self._flights.append(Flight(plan, rows, chunks, now, queue))

    def stats(self) -> EngineStats:
        """The engine's numbers."""
        view = self.engine.view
        return EngineStats(
            num_running=view.num_running,
            num_waiting=view.num_waiting,
            kv_usage=1.0 - view.kv_free,
            num_preemptions=self._preemptions,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
        )
