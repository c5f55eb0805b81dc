"""From a step's few numbers to the tensors that its forward pass takes, on the device that holds the rest.

Every sequence on a worker has a slot; a slot's row holds its block table, how many of its tokens are in the cache, and
its newest token. A step names slots and what is new about them.

Shapes: N slots, the last of which is no sequence's but padding's; W entries of a block table; U new entries;
S sequences of a step, those that decode (one token each) first; T tokens of the step; P tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gllm_kernels.jit import runs_triton, tl, triton

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 256


class SlotState(NamedTuple):
    """What the device keeps of all slots."""

    block_tables_NW: Tensor  # int32
    lengths_N: Tensor  # int32, tokens in the cache
    last_tokens_N: Tensor  # int64, the newest token of each, which the cache does not hold yet


class StepRows(NamedTuple):
    """A step, as the host describes it; every tensor is int32 on the device.

    A step may be padded: rows of the padding slot at its end own the tokens that no sequence has. The host's numbers
    are then bounds, from which the sizes of tensors and launches come, and the device's are true.
    """

    slots_S: Tensor
    starts_S: Tensor  # where each chunk of a prompt starts; of decodes unused: the device knows
    query_starts: Tensor  # [S + 1]: sequence s has tokens query_starts[s] to query_starts[s + 1]; beyond T counts as T
    prompt_tokens: Tensor  # of all chunks, one after the other
    num_decodes_1: Tensor  # sequences at the front that decode
    num_decodes: int
    num_chunks: int
    num_tokens: int
    max_query_len: int
    table_width: int  # block table entries that anyone needs


class StepInputs(NamedTuple):
    """What a forward pass takes. Padding has token 0 at position 0, no keys, and -1 for a place in the cache."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slot_mapping_T: Tensor  # int64: block * P + offset
    kv_lens_S: Tensor  # int32, this step's tokens included
    block_tables_SB: Tensor  # int32, `table_width` columns


def set_blocks(block_tables_NW: Tensor, entries_U3: Tensor) -> None:
    """Write (slot, index, block) entries, int32, into the tables, in place."""
    if runs_triton(block_tables_NW):
        set_blocks_triton(block_tables_NW, entries_U3)
    else:
        set_blocks_reference(block_tables_NW, entries_U3)


def set_blocks_triton(block_tables_NW: Tensor, entries_U3: Tensor) -> None:
    """One thread an entry."""
    num = len(entries_U3)
    _set_blocks[(triton.cdiv(num, _BLOCK),)](block_tables_NW, entries_U3, num, block_tables_NW.shape[1], BLOCK=_BLOCK)


def set_blocks_reference(block_tables_NW: Tensor, entries_U3: Tensor) -> None:
    """Plain torch."""
    slots_U, places_U, blocks_U = entries_U3.long().unbind(1)
    block_tables_NW[slots_U, places_U] = blocks_U.to(torch.int32)


def lay_out(state: SlotState, rows: StepRows, *, block_size: int) -> StepInputs:
    """Inputs of a step, and the lengths of its slots after it (in place).

    Raises:
        ValueError: Tensors of another type or shape than `SlotState` and `StepRows` say.
    """
    if state.lengths_N.dtype != torch.int32 or state.last_tokens_N.dtype != torch.int64:
        raise ValueError("lengths are int32 and tokens are int64")
    if rows.query_starts.numel() != rows.slots_S.numel() + 1 or rows.starts_S.numel() < rows.slots_S.numel():
        raise ValueError("a step has a start for each sequence, and one more query start than sequences")
    if runs_triton(state.lengths_N):
        return lay_out_triton(state, rows, block_size=block_size)
    return lay_out_reference(state, rows, block_size=block_size)


def lay_out_triton(state: SlotState, rows: StepRows, *, block_size: int) -> StepInputs:
    """A program for so many tokens, and so many table entries, of one sequence."""
    device, num_rows, num_tokens = state.lengths_N.device, rows.slots_S.numel(), rows.num_tokens
    token_ids_T = torch.empty(num_tokens, dtype=torch.int64, device=device)
    positions_T, slot_mapping_T = torch.empty_like(token_ids_T), torch.empty_like(token_ids_T)
    kv_lens_S = torch.empty(num_rows, dtype=torch.int32, device=device)
    block_tables_SB = torch.empty(num_rows, rows.table_width, dtype=torch.int32, device=device)
    longest = max(rows.max_query_len, rows.table_width)
    _lay_out[(num_rows, triton.cdiv(longest, _BLOCK))](
        *state,
        *rows[:5],
        token_ids_T,
        positions_T,
        slot_mapping_T,
        kv_lens_S,
        block_tables_SB,
        num_tokens,
        state.block_tables_NW.shape[1],
        rows.table_width,
        state.lengths_N.numel() - 1,
        block_size,
        BLOCK=_BLOCK,
    )
    return StepInputs(token_ids_T, positions_T, slot_mapping_T, kv_lens_S, block_tables_SB)


def lay_out_reference(state: SlotState, rows: StepRows, *, block_size: int) -> StepInputs:
    """Plain torch."""
    num_rows, num_decodes = rows.slots_S.numel(), int(rows.num_decodes_1)
    slots_S = rows.slots_S.long()
    query_starts = rows.query_starts.clamp(max=rows.num_tokens)
    counts_S = query_starts.diff().long()
    is_decode_S = torch.arange(num_rows, device=slots_S.device) < num_decodes
    starts_S = torch.where(is_decode_S, state.lengths_N[slots_S], rows.starts_S[:num_rows]).long()
    owners_T = torch.repeat_interleave(counts_S, output_size=rows.num_tokens)
    offsets_T = torch.arange(rows.num_tokens, device=slots_S.device) - query_starts[owners_T]
    is_padding_S = slots_S == state.lengths_N.numel() - 1
    is_padding_T = is_padding_S[owners_T]
    positions_T = (starts_S[owners_T] + offsets_T).masked_fill(is_padding_T, 0)
    blocks_T = state.block_tables_NW[slots_S[owners_T], positions_T // block_size].long()
    given = rows.prompt_tokens[: rows.num_tokens - num_decodes].long()
    tokens_T = torch.zeros(rows.num_tokens, dtype=torch.int64, device=slots_S.device)
    tokens_T[: num_decodes + len(given)] = torch.cat((state.last_tokens_N[slots_S[:num_decodes]], given))
    kv_lens_S = (starts_S + counts_S).masked_fill(is_padding_S, 0).to(torch.int32)
    state.lengths_N[slots_S] = kv_lens_S
    return StepInputs(
        tokens_T.masked_fill(is_padding_T, 0),
        positions_T,
        (blocks_T * block_size + positions_T % block_size).masked_fill(is_padding_T, -1),
        kv_lens_S,
        state.block_tables_NW[slots_S, : rows.table_width],
    )


@triton.jit(do_not_specialize=["num"])
def _set_blocks(block_tables_NW, entries_U3, num, width, BLOCK: tl.constexpr):
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(entries_U3 + 3 * u, u < num, other=0)
    places = tl.load(entries_U3 + 3 * u + 1, u < num, other=0)
    blocks = tl.load(entries_U3 + 3 * u + 2, u < num, other=0)
    tl.store(block_tables_NW + slots.to(tl.int64) * width + places, blocks, u < num)


@triton.jit(
    do_not_specialize=["num_tokens", "table_width", "padding"],
    do_not_specialize_on_alignment=["slots_S", "starts_S", "query_starts", "prompt_tokens", "num_decodes_1"],
)  # parts of a larger tensor
def _lay_out(
    block_tables_NW,
    lengths_N,
    last_tokens_N,
    slots_S,
    starts_S,
    query_starts,
    prompt_tokens,
    num_decodes_1,
    token_ids_T,
    positions_T,
    slot_mapping_T,
    kv_lens_S,
    block_tables_SB,
    num_tokens,
    width,
    table_width,
    padding,
    block_size,
    BLOCK: tl.constexpr,
):
    s, part = tl.program_id(0), tl.program_id(1)
    lane = part * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_S + s).to(tl.int64)
    num_decodes = tl.load(num_decodes_1)
    is_real, is_decode = slot != padding, s < num_decodes
    first = tl.minimum(tl.load(query_starts + s), num_tokens)
    count = tl.minimum(tl.load(query_starts + s + 1), num_tokens) - first
    start = tl.where(is_decode, tl.load(lengths_N + slot), tl.load(starts_S + s))
    start = tl.where(is_real, start, 0)

    is_token = lane < count
    positions = tl.where(is_real, start + lane, 0).to(tl.int64)
    table = block_tables_NW + slot * width
    blocks = tl.load(table + positions // block_size, is_token & is_real, other=0).to(tl.int64)
    newest = tl.load(last_tokens_N + slot)
    is_given = is_token & is_real & (s >= num_decodes)
    given = tl.load(prompt_tokens + first - num_decodes + lane, is_given, other=0).to(tl.int64)
    tokens = tl.where(is_decode & is_real, newest, given)
    places = tl.where(is_real, blocks * block_size + positions % block_size, -1)
    tl.store(token_ids_T + first + lane, tokens, is_token)
    tl.store(positions_T + first + lane, positions, is_token)
    tl.store(slot_mapping_T + first + lane, places, is_token)

    is_entry = lane < table_width
    entries = tl.load(table + lane, is_entry, other=0)
    tl.store(block_tables_SB + s.to(tl.int64) * table_width + lane, entries, is_entry)
    # Whoever else reads this length belongs to the same sequence, and has no token of a decode to place.
    if part == 0:
        kv_len = tl.where(is_real, start + count, 0)
        tl.store(kv_lens_S + s, kv_len)
        tl.store(lengths_N + slot, kv_len)
