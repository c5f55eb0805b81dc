"""The course of a profile: which steps the workers are given, in which order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from gllm.console.progress import show_progress
from gllm.runtime.profile.clock import measure_clock
from gllm.runtime.profile.grids import make_grid
from gllm.runtime.profile.host import measure_host
from gllm.runtime.profile.measure import measure
from gllm.runtime.profile.session import Session
from gllm.runtime.profile.steps import StepMaker, chunks
from gllm.runtime.profile.tables import make_tables

if TYPE_CHECKING:
    from gllm.runtime.engine.workers import Workers
    from gllm.runtime.profile import session as sessions
    from gllm.runtime.profile.grids import Grid, Room
    from gllm.runtime.profile.measure import Times
    from gllm.runtime.profile.steps import Mix

_FILLING_CHUNK = 512
_REST_S = 0.5  # after that


def take_profile(
    workers: Workers,
    room: Room,
    *,
    policy: str,
    vocab_size: int,
    intake_ns: int,
    on_gpu: bool,
    quick: bool,
    quiet: bool,
) -> dict[str, Any]:
    """All that is measured.

    Args:
        workers: loaded, and asked for nothing yet.
        room: for steps.
        policy: of the engine.
        vocab_size: of the model.
        intake_ns: a request's way to an engine, measured before.
        on_gpu: its clock depends on what it draws, so first compute keys and values into every block, for that depends
            on the numbers that it moves; let it rest before large steps; and measure what those in a row do to it.
        quick: few points.
        quiet: no progress.

    Raises:
        ValueError: There is no room for a profile.
    """
    grid = make_grid(room, quick=quick)
    # What compares clocks comes first: those of GPUs drift. And workers count an engine's steps from 0.
    host, num_plans = measure_host(workers, policy, room.limits, vocab_size)
    maker = StepMaker(room.limits, vocab_size, max_tokens=grid.room.max_tokens, first_plan=num_plans)
    tables = measure_tables(workers, grid, maker, on_gpu=on_gpu, quiet=quiet)
    return {**tables, "host": {"intake_ns": intake_ns, **host._asdict()}}


def measure_tables(
    workers: sessions.Workers, grid: Grid, maker: StepMaker, *, on_gpu: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """What is measured with steps made by hand."""
    limits = grid.room.limits
    # With a single step on the road, none would be there when the one before ends.
    session = Session(workers, num_stages=limits.depth, max_in_flight=max(limits.max_in_flight, 2))
    transfer_ns = {}
    for num in grid.transfer_tokens:
        found = measure(session, maker, grid.base(num), alone=True).transfer_ns
        assert found is not None, "there is more than one stage"
        transfer_ns[num] = max(0, found)  # shorter than the clocks of two GPUs agree
    if on_gpu:
        fill(session, maker, grid.room)
        session.rest(_REST_S)
    mixes = sorted(grid.mixes(), key=lambda mix: mix.num_tokens)  # small ones do not rest: none follows a large one
    times: dict[Mix, Times] = {}
    watching = show_progress(len(mixes), lambda: len(times), what="kinds of steps", doing="profiling")
    with nullcontext() if quiet else watching:
        for mix in mixes:
            times[mix] = measure(session, maker, mix, rests=on_gpu)
    clocked = measure_clock(session, maker, grid, times, quiet=quiet) if on_gpu else None
    if clocked is None:
        return {**make_tables(grid, times, transfer_ns), "clock": None}
    return {**make_tables(grid, clocked.times, transfer_ns), "clock": clocked.part()}


def fill(session: Session, maker: StepMaker, room: Room) -> None:
    """Prompts into every block of the cache; their makers hand blocks out one after another."""
    limits = room.limits
    size = min(_FILLING_CHUNK, limits.max_tokens_per_sequence, room.max_tokens)
    most = min(room.max_tokens // size, limits.max_num_seqs)
    mix = next(each for each in (chunks(num, 0, size) for num in range(most, 0, -1)) if room.fits(each))
    blocks = len(mix.chunks) * -(-size // limits.block_size)
    for _ in range(-(-limits.num_blocks // blocks)):
        session.run(maker.make(mix, 1)[1])
