"""From a policy's decision to a `Plan`: first everything is checked, then everything is committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from gllm.core.decision import PlanError
from gllm.core.events import Scheduled
from gllm.core.plan import Chunk, Plan
from gllm.core.request import NEVER, PREFILLED, PREFILLING, WAITING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from gllm.core.decision import Batch, SequenceView
    from gllm.core.events import Event
    from gllm.core.kvcache import BlockPool
    from gllm.core.request import Sequence
    from gllm.core.state import State


def plan_batch(state: State, batch: Batch, max_tokens: int, events: list[Event]) -> Plan:
    """Check a batch as a whole, then carry it out: allocate, move sequences on, put the plan on the road.

    Raises:
        PlanError: The batch cannot be committed; nothing was changed.
    """
    num_decode = _check_batch(state, batch, max_tokens)
    rotation, pool = state.rotation, state.pool
    plan = Plan(state.num_plans)
    state.num_plans += 1
    state.in_flight.append(plan)
    chunks: Seq[tuple[Sequence, int]] = batch.prefill  # type: ignore[assignment]  # policies hold our own sequences
    if chunks:
        for sequence, _ in chunks:
            if sequence.phase is WAITING:  # before anything is allocated, lest its cached prefix be evicted
                _admit(state, sequence, events)
    if batch.decode:
        rotation.bring_forward(cast("Iterable[Sequence]", batch.decode))
    if num_decode:
        rotation.take(num_decode).advance(plan, pool)
        if pool.num_repeats and num_decode > 1:
            _note_repeats(state, plan)
    if chunks:
        _commit_chunks(state, plan, chunks)
        num_decode += len(plan.prefilled)
    plan.num_sampled = num_decode
    plan.num_free_blocks = pool.num_free
    return plan


def _note_repeats(state: State, plan: Plan) -> None:
    """What a plan's decodes have in common. Who holds a block is not looked up: right where all do, else an estimate.

    Of n holders of everything m have m - 1 repeats for each block, of n - 1 there are.
    """
    pool, num_decode = state.pool, plan.num_decode_tokens
    num_holders = state.num_running + sum(len(flying.late) for flying in state.in_flight)
    repeats = pool.num_repeats * pool.block_size * (num_decode - 1) // (num_holders - 1)
    plan.decode_repeats = min(repeats, plan.decode_context * (num_decode - 1) // num_decode)
    plan.common_context = pool.num_common * pool.block_size


def _check_batch(state: State, batch: Batch, max_tokens: int) -> int:
    """Raise `PlanError` unless the batch can be committed whole; return its number of decode steps."""
    prefill, num_decode, names = batch.prefill, batch.num_decode, batch.decode
    tokens = blocks = 0
    if names:
        num_decode = _check_named(batch)
    elif num_decode < 0 or num_decode > state.rotation.num_ready:
        raise PlanError(f"{num_decode} decode steps asked for, {state.rotation.num_ready} sequences are ready")
    if prefill:
        tokens, blocks = _check_chunks(state, prefill)
    elif not num_decode:
        raise PlanError("an empty batch; a policy with nothing to plan says Wait")
    if tokens + num_decode > max_tokens:
        raise PlanError(f"{tokens + num_decode} tokens in one batch, the policy promised at most {max_tokens}")
    if (
        blocks + num_decode > state.pool.num_free
    ):  # each step needs one block at most; count exactly only when it is tight
        _check_blocks(state, batch, blocks)
    return num_decode


def _check_blocks(state: State, batch: Batch, blocks: int) -> None:
    if batch.decode:
        names = cast("Iterable[Sequence]", batch.decode)
        blocks += sum(sequence.id in sequence.group.growing() for sequence in names if sequence.group)
    else:
        blocks += state.rotation.count_blocks(batch.num_decode)
    if blocks > state.pool.num_free:
        raise PlanError(f"the batch needs {blocks} cache blocks, {state.pool.num_free} are free")


def _check_named(batch: Batch) -> int:
    if batch.num_decode:
        raise PlanError("a batch either counts decode steps or names them, not both")
    names = cast("Seq[Sequence]", batch.decode)
    for sequence in names:
        if sequence.group is None or not sequence.group.ready:
            raise PlanError(f"{sequence!r} is not ready to decode")
    if len({sequence.id for sequence in names}) != len(names):
        raise PlanError("a sequence is named twice")
    return len(names)


def _check_chunks(state: State, prefill: Seq[tuple[SequenceView, int]]) -> tuple[int, int]:
    """Check each chunk; return (tokens, blocks) of all."""
    tokens = blocks = admitted = 0
    size = state.pool.block_size
    for sequence, count in cast("Seq[tuple[Sequence, int]]", prefill):
        left = sequence.num_uncomputed_tokens
        if sequence.phase is PREFILLING:
            blocks += -(-(sequence.num_computed_tokens + count) // size) - len(sequence.blocks)
        elif sequence.phase is WAITING and sequence.id in state.sequences:
            admitted += 1
            left -= state.cached_tokens(sequence)
            blocks += state.chunk_blocks(sequence, count)
        else:
            raise PlanError(f"{sequence!r} has no prompt left to plan")
        if count < 1 or count > left:
            raise PlanError(f"{count} tokens asked for {sequence!r}, {left} are left to compute")
        tokens += count
    if len(prefill) > 1 and len({sequence.id for sequence, _ in prefill}) != len(prefill):
        raise PlanError("a sequence is named twice")
    if admitted and state.num_running + admitted > state.limits.max_num_seqs:
        raise PlanError(f"{admitted} more sequences would exceed max_num_seqs={state.limits.max_num_seqs}")
    return tokens, blocks


def _commit_chunks(state: State, plan: Plan, prefill: Seq[tuple[Sequence, int]]) -> None:
    chunks = []
    tokens = pairs = context = 0
    pool = state.pool
    size = pool.block_size
    for sequence, count in prefill:
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + count
        sequence.num_uncomputed_tokens -= count
        sequence.last_plan = plan.id
        need = -(-end // size) - len(sequence.blocks)
        if need > 0:
            sequence.blocks += pool.allocate(need)
        if sequence.request.block_hashes:
            _publish(pool, sequence)
        final = end == sequence.target
        if final:
            _complete_prompt(state, plan, sequence)
        chunks.append(Chunk(sequence, start, count, final, sequence.last_token_plan))
        tokens += count
        pairs += count * start + count * (count + 1) // 2
        context += end
    plan.chunks = chunks
    plan.num_prefill_tokens = tokens
    plan.prefill_pairs = pairs
    plan.prefill_context = context
    state.num_waiting_tokens -= tokens


def _admit(state: State, sequence: Sequence, events: list[Event]) -> None:
    state.queue.remove(sequence)
    hits: Seq[int] = state.find_hits(sequence).hits if sequence.request.block_hashes else ()
    if hits:
        state.pool.acquire(hits)
        sequence.blocks.extend(hits)
        sequence.num_hashed = len(hits)
        cached = len(hits) * state.limits.block_size
        sequence.num_computed_tokens = cached
        sequence.num_uncomputed_tokens -= cached
        state.num_waiting_tokens -= cached
    sequence.hits = ()
    sequence.hits_version = NEVER
    sequence.phase = PREFILLING
    state.prefilling_by_id[sequence.id] = sequence
    state.running_by_id[sequence.id] = sequence
    state.num_waiting -= 1
    state.num_running += 1
    state.num_prefilling += 1
    state.num_reserved_blocks += state.limit_blocks(sequence)
    if not sequence.admitted:
        sequence.admitted = True
        events.append(Scheduled(sequence.id, sequence.num_computed_tokens))


def _publish(pool: BlockPool, sequence: Sequence) -> None:
    """Make the prompt's full blocks findable.

    Already at planning: micro-batches run in order, so whoever hits a block runs after it is written.
    """
    if pool.sharing:
        hashes = sequence.request.block_hashes
        full = min(sequence.num_computed_tokens // pool.block_size, len(hashes))
        if full > sequence.num_hashed:
            pool.share(sequence.blocks, hashes, sequence.num_hashed, full)
            sequence.num_hashed = full


def _complete_prompt(state: State, plan: Plan, sequence: Sequence) -> None:
    del state.prefilling_by_id[sequence.id]
    state.num_prefilling -= 1
    sequence.phase = PREFILLED
    sequence.settle(sequence.target + 1)
    if sequence.target + 1 == sequence.limit:
        plan.ending = [*plan.ending, sequence]
    plan.prefilled = [*plan.prefilled, sequence]


def check_victims(state: State, victims: Seq[SequenceView]) -> None:
    """Raise `PlanError` unless all of these can be preempted."""
    ids = [sequence.id for sequence in victims]
    if not ids or len(set(ids)) != len(ids):
        raise PlanError("a preemption names at least one sequence, and none twice")
    for sequence in victims:
        if sequence.id not in state.running_by_id:
            raise PlanError(f"{sequence!r} holds no cache to preempt")
        if state.on_road(sequence):
            raise PlanError(f"{sequence!r} is on the road; only idle sequences can be preempted")
