"""The engine: a pure state machine from what happened to what to do next.

A shell (the simulator's or the runtime's) calls `Engine.turn` with what came back, what arrived and
what the clock says, carries out the plans it gets, and calls again when something happened. The
engine has no clock, does no I/O, draws no lots and never sees a token's value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from gllm.core.decision import Batch, PlanError, Preempt, StallError, Wait, WaitReason
from gllm.core.events import Event, Finished, FirstToken, Preempted, Rejected
from gllm.core.invariants import check_invariants
from gllm.core.plan import Plan, Turn
from gllm.core.planning import check_victims, plan_batch
from gllm.core.request import DECODING, FINISHED, NEVER, PREFILLED, PREFILLING, WAITING, Sequence
from gllm.core.rotation import DecodeGroup
from gllm.core.state import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gllm.core.decision import Limits, Policy, View
    from gllm.core.plan import StepResult, Stopped
    from gllm.core.request import Request

_PIPELINE_FULL: Final = Wait(WaitReason.PIPELINE_FULL)
_NOTHING_READY: Final = Wait(WaitReason.NOTHING_READY)
_NO_WORK: Final = Wait(WaitReason.NO_WORK)


def _id_of(stopped: Stopped) -> int:
    return stopped.id


class Engine:
    """One scheduler core under one policy.

    With `keep_snapshots` each plan carries the numbers that the policy saw, for the decision log.
    """

    def __init__(self, policy: Policy, limits: Limits, *, keep_snapshots: bool = False) -> None:
        self.policy = policy
        self.limits = limits
        self._max_batch_tokens = policy.max_batch_tokens(limits)
        self._keep_snapshots = keep_snapshots
        self._looks_ahead = limits.max_in_flight > limits.depth
        self._state = State(limits, policy.order)
        self._events: list[Event] = []
        self._preempted: list[int] = []

    @property
    def view(self) -> View:
        """What policies see."""
        return self._state

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not ended."""
        return len(self._state.sequences)

    def turn(
        self,
        results: Iterable[StepResult] = (),
        requests: Iterable[Request] = (),
        aborts: Iterable[int] = (),
        *,
        now: int,
    ) -> Turn:
        """Complete, submit, abort, then plan until the policy waits; `now` in ns.

        Raises:
            PlanError: The policy asked for the impossible; nothing of that decision was carried out.
            StallError: Work is left, nothing is on the road, and the policy waits for nothing.
        """
        self._state.now_ns = now
        events: list[Event] = []
        self._events = events
        for result in results:
            self._complete(result)
        for request in requests:
            self._submit(request)
        for request_id in aborts:
            self._abort(request_id)
        plans: list[Plan] = []
        return Turn(plans, events, self._decide(plans))

    def _decide(self, plans: list[Plan]) -> Wait:
        state = self._state
        room = self.limits.max_in_flight - len(state.in_flight)
        while room:
            if not (state.rotation.num_ready or state.num_waiting_tokens):
                return _NOTHING_READY if state.sequences else _NO_WORK
            snapshot = state.snapshot() if self._keep_snapshots else None
            decision = self.policy.decide(state)
            if type(decision) is Batch:
                plan = plan_batch(state, decision, self._max_batch_tokens, self._events)
                plans.append(plan)
                room -= 1
                if snapshot is not None:
                    plan.saw = snapshot
                if self._preempted:
                    plan.preempted, self._preempted = self._preempted, []
                if self._looks_ahead:
                    self._release_early()
            elif type(decision) is Preempt:
                self._preempt(decision)
            else:
                return self._check_wait(cast("Wait", decision))
        return _PIPELINE_FULL

    def _check_wait(self, wait: Wait) -> Wait:
        state = self._state
        if wait.until_ns is not None:
            if wait.until_ns <= state.now_ns:
                raise PlanError(f"{self.policy!r} waits until {wait.until_ns} ns, and it is {state.now_ns} ns already")
            return wait
        if state.in_flight:
            return wait
        raise StallError(
            f"{self.policy!r} waits ({wait.reason}) with nothing on the road and no time to wake: {state.snapshot()}"
        )

    def _submit(self, request: Request) -> None:
        state = self._state
        if request.id in state.sequences:
            raise ValueError(f"request {request.id} was submitted twice")
        longest = self.limits.max_tokens_per_sequence
        room = longest - request.num_prompt_tokens
        if room < 1:
            cause = "the model's length" if longest == self.limits.max_model_len else "the whole KV cache"
            self._events.append(
                Rejected(
                    request.id,
                    f"prompt of {request.num_prompt_tokens} tokens and one to answer exceed {cause}, {longest}",
                )
            )
            return
        limit = request.num_prompt_tokens + min(room, request.max_tokens or room)
        sequence = Sequence(request, limit)
        state.sequences[request.id] = sequence
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self._state.queue.add(sequence)
        self._state.num_waiting += 1
        self._state.num_waiting_tokens += sequence.target

    def _complete(self, result: StepResult) -> None:
        state = self._state
        number, stopped = result.plan, result.stopped
        if not state.in_flight or number != state.in_flight[0].id:
            raise ValueError(f"result of plan {number}; plan {state.oldest_in_flight} is the next to come back")
        if stopped:  # errors while the plan still counts as on the road: that step gave them no token
            self._fail([entry.id for entry in stopped if entry.reason == "error"])
        plan = state.in_flight.popleft()
        if plan.prefilled:
            self._note_first_tokens(plan)
        # By id, so that blocks are freed in one order, whichever way a shell found out.
        for entry in stopped if len(stopped) < 2 else sorted(stopped, key=_id_of):
            self._stop(entry)
        if plan.ending:
            self._end_at_limit(plan.ending)
        if not plan.released:
            self._release(plan)
        if plan.late:
            for sequence in plan.late:
                self._free(sequence)
        if self._looks_ahead:
            self._release_early()

    def _note_first_tokens(self, plan: Plan) -> None:
        for sequence in plan.prefilled:
            if sequence.last_token_plan == NEVER and sequence.phase is not FINISHED:
                self._events.append(FirstToken(sequence.id))

    def _release(self, plan: Plan) -> None:
        """Make the plan's sequences plannable again."""
        plan.released = True
        group = plan.group
        if plan.prefilled:
            group = self._begin_decoding(plan.prefilled, group)
        if group is not None:
            self._state.rotation.add(group)

    def _begin_decoding(self, prefilled: Iterable[Sequence], group: DecodeGroup | None) -> DecodeGroup | None:
        for sequence in prefilled:
            if sequence.phase is PREFILLED:
                sequence.phase = DECODING
                self._state.num_decoding += 1
                if sequence.num_tokens < sequence.limit:
                    group = group or DecodeGroup(self.limits.block_size)
                    group.join(sequence)
        return group

    def _release_early(self) -> None:
        """Asynchronous scheduling: plan the next step before the last token's value is known.

        Only once a full pipeline of micro-batches follows, so the token arrives just in time, and
        never two steps beyond the last known token: a stop found late discards one token at most.
        """
        flight = self._state.in_flight
        for index in range(len(flight) - self.limits.depth + 1):
            plan = flight[index]
            if not plan.released and plan.depends_on < flight[0].id:
                self._release(plan)

    def _stop(self, stopped: Stopped) -> None:
        sequence = self._state.sequences.get(stopped.id)
        if sequence is None:  # aborted while on the road, or failed
            return
        if stopped.block_hashes and self.limits.prefix_caching:
            full = min(len(stopped.block_hashes), (sequence.num_tokens - 1) // self.limits.block_size)
            self._state.pool.share(sequence.blocks, stopped.block_hashes, sequence.num_hashed, full)
            sequence.num_hashed = max(full, sequence.num_hashed)
        self._end(sequence, stopped.reason)

    def _fail(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            sequence = self._state.sequences.get(request_id)
            if sequence is not None:
                self._state.pool.forget(sequence.blocks[: sequence.num_hashed])
                self._end(sequence, "error")

    def _abort(self, request_id: int) -> None:
        sequence = self._state.sequences.get(request_id)
        if sequence is not None:  # else it ended already
            self._end(sequence, "abort")

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Forget a sequence; its blocks stay until the last plan that writes them is back."""
        state = self._state
        del state.sequences[sequence.id]
        unseen = state.token_plans(sequence)
        for plan in unseen:
            plan.num_discarded += 1
        num_output_tokens = sequence.num_output_tokens - len(unseen)
        newest = sequence.newest_plan()
        self._withdraw(sequence)
        sequence.phase = FINISHED
        oldest = state.oldest_in_flight
        if newest >= oldest:
            plan = state.in_flight[newest - oldest]
            plan.late = [*plan.late, sequence]
        elif sequence.blocks:
            self._free(sequence)
        self._events.append(Finished(sequence.id, reason, num_output_tokens))

    def _end_at_limit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.phase is not FINISHED:
                self._end(sequence, "length")

    def _withdraw(self, sequence: Sequence) -> None:
        """Take a sequence out of whichever queue holds it, and out of the counters."""
        state = self._state
        phase = sequence.phase
        if phase is WAITING:
            state.queue.remove(sequence)
            state.num_waiting -= 1
            state.num_waiting_tokens -= sequence.target
            return
        del state.running_by_id[sequence.id]
        state.num_running -= 1
        if phase is PREFILLING:
            del state.prefilling_by_id[sequence.id]
            state.num_prefilling -= 1
            state.num_waiting_tokens -= sequence.num_uncomputed_tokens
        elif phase is DECODING:
            state.num_decoding -= 1
            if sequence.group is not None:
                state.rotation.leave(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._state.pool.release(sequence.blocks, sequence.num_hashed)
        self._state.num_reserved_blocks -= self._state.limit_blocks(sequence)
        sequence.blocks = []

    def _preempt(self, decision: Preempt) -> None:
        """Recompute later: free the cache, queue again with the outputs as part of the prompt."""
        victims = cast("Iterable[Sequence]", decision.sequences)
        check_victims(self._state, decision.sequences)
        for sequence in victims:
            self._withdraw(sequence)
            self._free(sequence)
            sequence.restart()
            self._enqueue(sequence)
            self._preempted.append(sequence.id)
            self._events.append(Preempted(sequence.id))

    def check_invariants(self) -> None:
        """Walk the whole state; raise AssertionError if anything is lost, leaked or miscounted."""
        check_invariants(self._state)
