"""One simulated run, from a configuration and a trace to the record that reports are made from."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gllm.core import PlanError, Request, StallError
from gllm.report.decision_log import DecisionLog
from gllm.report.recorder import Recorder
from gllm.sim.driver import Arrival, Simulation
from gllm.sim.pipeline import recurrence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from gllm.report.record import RunRecord
    from gllm.sim.config import Setup, SimConfig
    from gllm.sim.cost import CostModel
    from gllm.sim.pipeline import MakePipeline
    from gllm.trace import Trace, TraceRequest

    Progress = Callable[[int, Callable[[], int]], AbstractContextManager[object]]
    """Called with the number of requests and with what counts those that ended; entered for the run."""

_SELDOM = (200_000, 20, 20)


def simulate(
    config: SimConfig,
    trace: Trace,
    *,
    cost: CostModel | None = None,
    log_path: Path | None = None,
    digest: bool = False,
    progress: Progress | None = None,
    pipeline: MakePipeline = recurrence,
) -> RunRecord:
    """Replay `trace` in virtual time.

    Args:
        config: What serves it.
        trace: The requests.
        cost: What says how long steps take, in the place of the configuration's own.
        log_path: Where to write the decision log; None: nowhere.
        digest: Hash the decisions even if no log is written.
        progress: Told how far the run is, while it goes.
        pipeline: What makes the pipeline; a test holds the two that exist equal.

    Raises:
        ValueError: The configuration does not fit together.
        PlanError: The policy asked for the impossible; the message names it.
        StallError: The policy let work wait for ever; the message names it.
    """
    setup = config.resolve()
    cost = setup.cost if cost is None else cost
    recorder = Recorder(cost.num_stages)
    with ExitStack() as stack:
        log = stack.enter_context(DecisionLog(log_path)) if digest or log_path is not None else None
        engine = setup.engine(keep_snapshots=log_path is not None)
        simulation = Simulation(engine, arrivals(config, trace), cost, recorder, log, pipeline)
        stack.enter_context(_watched(progress, trace, recorder))
        stack.enter_context(_few_collections())
        start = perf_counter()
        _run(simulation, config)
        wall_s = perf_counter() - start
    return recorder.record(
        config=_described(setup, trace),
        mode="simulated",
        wall_s=wall_s,
        decision_sha256=None if log is None else log.sha256,
        num_blocks=setup.limits.num_blocks,
        block_size=setup.limits.block_size,
    )


def arrivals(config: SimConfig, trace: Trace) -> Iterator[Arrival]:
    """The trace's requests for the engine, numbered from 0, each made when it is due."""
    block_size = config.block_size if config.prefix_caching else 0
    for number, row in enumerate(trace.requests):
        yield Arrival(_request(number, row, block_size), row.num_output_tokens)


def _request(number: int, row: TraceRequest, block_size: int) -> Request:
    assert row.arrival_ns is not None, "load_trace gives every request a time"
    return Request(
        id=number,
        num_prompt_tokens=row.num_prompt_tokens,
        arrival_ns=row.arrival_ns,
        max_tokens=row.max_tokens,
        priority=row.priority,
        deadline_ns=row.deadline_ns,
        block_hashes=row.block_hashes(block_size) if block_size and row.hash_ids else (),
    )


def _run(simulation: Simulation, config: SimConfig) -> None:
    try:
        simulation.run()
    except (PlanError, StallError) as error:
        raise type(error)(f"policy {config.policy}: {error}") from error


def _described(setup: Setup, trace: Trace) -> dict[str, Any]:
    """The configuration with what the trace turned out to be."""
    config = setup.to_json()
    found = {"format": trace.format, "num_requests": len(trace.requests), "notes": list(trace.notes)}
    return {**config, "trace": {**(config["trace"] or {}), "name": trace.name, **found}}


def _watched(progress: Progress | None, trace: Trace, recorder: Recorder) -> AbstractContextManager[object]:
    if progress is None:
        return nullcontext()
    return progress(len(trace.requests), lambda: recorder.num_ended)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Keep the garbage collector from walking the trace again and again: a run makes hardly any cycles."""
    before: Iterable[int] = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
