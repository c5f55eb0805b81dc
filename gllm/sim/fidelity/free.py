"""The simulator running free: of the recorded run it knows what clients did, and nothing of what became of it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.core import Engine
from gllm.report.decision_log import LOG_NAME, DecisionLog, read_decisions
from gllm.report.metrics import summarize
from gllm.report.recorder import Recorder
from gllm.sim.diff import first_parting
from gllm.sim.driver import Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gllm.core import Stopped
    from gllm.report.record import RunRecord
    from gllm.sim.cost import CostModel
    from gllm.sim.driver import Arrival
    from gllm.sim.fidelity.runs import RecordedRun
    from gllm.sim.recording import Recording


class FreeDecisions(NamedTuple):
    """How the decisions of a free simulation compare with the recorded ones."""

    num_recorded: int
    num_simulated: int
    first_difference: int | None  # decisions before it are equal; None: all are
    num_requests: int
    num_same_chunks: int  # requests whose prompts were computed in the same chunks


def run_free(run: RecordedRun, cost: CostModel, log_path: Path | None = None) -> RunRecord:
    """Simulate a recorded run's requests with what `cost` says of time; write the decision log, if anywhere."""
    recording = run.recording
    limits = recording.limits
    engine = Engine(recording.policy, limits, keep_snapshots=log_path is not None and recording.has_views)
    recorder = Recorder(cost.num_stages)
    start = perf_counter()
    with nullcontext() if log_path is None else DecisionLog(log_path) as log:
        Simulation(engine, recording.arrivals, cost, recorder, log, script=Clients(recording, cost.intake_ns)).run()
    return recorder.record(
        config=run.record.config,
        mode="simulated",
        wall_s=perf_counter() - start,
        decision_sha256=None if log is None else log.sha256,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
    )


def free_summary(run: RecordedRun, cost: CostModel) -> dict[str, Any]:
    """Of the same without a log."""
    return summarize(run_free(run, cost), slo_ttft_s=None, slo_tpot_s=None)


class Clients:
    """The driver's `Script` of what clients did: when requests came and which were aborted."""

    def __init__(self, recording: Recording, intake_ns: int) -> None:
        # A request may have been told after one that came later: ids are in the order of being told.
        asked_ns = accumulate((arrival.request.arrival_ns for arrival in recording.arrivals), max)
        self._due_ns = [time_ns + intake_ns for time_ns in asked_ns]
        self._moments = recording.moments

    @property
    def aborts(self) -> Iterator[tuple[int, Sequence[int]]]:
        """When requests are aborted and which."""
        return ((moment.now_ns, moment.aborted) for moment in self._moments if moment.aborted)

    def due_ns(self, arrival: Arrival) -> int:
        """When the client asked, and what that takes to the engine."""
        return self._due_ns[arrival.request.id]

    def amend(self, plan: int, stopped: list[Stopped]) -> None:
        """Nothing beyond what the true lengths say."""

    def wake_ns(self, until_ns: int) -> int:
        """As the policy asked."""
        return until_ns


def compare_free(run: RecordedRun, log_path: Path) -> FreeDecisions:
    """Compare the log of a free simulation with the recorded one."""
    recorded_path = run.folder / LOG_NAME
    parting = first_parting(recorded_path, log_path)
    (num_recorded, recorded), (num_simulated, simulated) = _chunks(recorded_path), _chunks(log_path)
    num_requests = len(run.recording.arrivals)
    return FreeDecisions(
        num_recorded=num_recorded,
        num_simulated=num_simulated,
        first_difference=None if parting is None else parting.number,
        num_requests=num_requests,
        num_same_chunks=len([key for key in range(num_requests) if recorded.get(key) == simulated.get(key)]),
    )


def _chunks(path: Path) -> tuple[int, dict[int, list[tuple[int, int]]]]:
    """Number of decisions of a log, and of each request its chunks, as (start, number of tokens)."""
    chunks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    num_decisions = 0
    for decision in read_decisions(path):
        num_decisions += 1
        for key, start, num_tokens in decision["prefill"]:
            chunks[key].append((start, num_tokens))
    return num_decisions, chunks
