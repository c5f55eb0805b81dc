"""What must hold after every turn, whatever happened; the tests check it after each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.core.request import DECODING, WAITING

if TYPE_CHECKING:
    from gllm.core.request import Sequence
    from gllm.core.state import State


def check_invariants(state: State) -> None:
    """Walk the whole state; raise AssertionError if anything is lost, leaked or miscounted."""
    late = [sequence for plan in state.in_flight for sequence in plan.late]
    running = list(state.running_by_id.values())
    waiting = list(state.queue)
    state.pool.check_invariants([sequence.blocks for sequence in [*running, *late]])
    assert len(waiting) + len(running) == len(state.sequences), "a sequence was lost"
    assert all(sequence.phase is WAITING and not sequence.blocks for sequence in waiting)
    assert len(running) <= state.limits.max_num_seqs
    assert len(state.in_flight) <= state.limits.max_in_flight
    _check_counters(state, waiting, running, late)
    _check_rotation(state)
    for sequence in running:
        _check_table(sequence, state.limits.block_size)


def _check_counters(state: State, waiting: list[Sequence], running: list[Sequence], late: list[Sequence]) -> None:
    assert (len(waiting), len(running)) == (state.num_waiting, state.num_running)
    assert len(state.prefilling_by_id) == state.num_prefilling
    assert state.num_decoding == sum(sequence.phase is DECODING for sequence in running)
    unplanned = [*waiting, *state.prefilling_by_id.values()]
    assert state.num_waiting_tokens == sum(sequence.num_uncomputed_tokens for sequence in unplanned)
    assert state.num_reserved_blocks == sum(map(state.limit_blocks, [*running, *late]))


def _check_rotation(state: State) -> None:
    for group in state.rotation:
        assert group.members, "an empty group in the rotation"
        assert group.ready
        assert group.context == sum(sequence.num_tokens for sequence in group.members.values())
    assert state.rotation.num_ready == sum(len(group.members) for group in state.rotation)


def _check_table(sequence: Sequence, block_size: int) -> None:
    """The block table covers just what is computed or planned."""
    covered = sequence.num_tokens - 1 if sequence.phase is DECODING else sequence.num_computed_tokens
    assert (len(sequence.blocks) - 1) * block_size < covered <= len(sequence.blocks) * block_size, sequence
