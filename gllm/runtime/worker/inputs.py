"""What a worker remembers of its slots, on the host and on the device, and a step's deltas on their way between them.

A step names only what is new: blocks, chunks of prompts, who decodes. The device keeps block tables, lengths and
newest tokens (`gllm_kernels.step_inputs`) and lays out the rest; the host keeps what it needs to know without asking.

Shapes: S sequences (decodes first, then chunks), T tokens, R sampled rows, U new block table entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from gllm_kernels.step_inputs import SlotState, StepRows, set_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gllm.runtime.messages import Step

    Ints = NDArray[np.int32]


class RowLayout:
    """Where the rows of a step with chunks lie in one int32 tensor: room for those of all slots and one of padding.

    Who decodes, starts and lengths come first, always of the same size, then the tokens of prompts. What no sequence
    has is padding (`StepRows`): a graph, which reads more rows and tokens than there are, finds only padding there.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots, self._most = num_slots, num_slots + 1
        self.num_header = 3 * self._most + 2

    def pack(self, slots: Ints, starts: Ints, query_starts: Ints, prompt_tokens: Ints, *, num_decodes: int) -> Ints:
        """All in one array; `query_starts` ends with the number of tokens."""
        packed = np.zeros(self.num_header + prompt_tokens.size, np.int32)
        most, num_rows = self._most, slots.size
        packed[0] = num_decodes
        packed[1 : 1 + most] = self._num_slots
        packed[1 : 1 + num_rows] = slots
        packed[1 + most : 1 + most + num_rows] = starts
        packed[1 + 2 * most + num_rows : self.num_header] = _BEYOND
        packed[1 + 2 * most : 2 + 2 * most + num_rows] = query_starts
        packed[self.num_header :] = prompt_tokens
        return packed

    def rows(
        self,
        packed: torch.Tensor,
        *,
        num_rows: int,
        num_decodes: int,
        num_chunks: int,
        num_tokens: int,
        table_width: int,
    ) -> StepRows:
        """So many of a packed tensor's rows; the numbers may be bounds."""
        most = self._most
        return StepRows(
            packed[1 : 1 + num_rows],
            packed[1 + most : 1 + most + num_rows],
            packed[1 + 2 * most : 2 + 2 * most + num_rows],
            packed[self.num_header : self.num_header + num_tokens],
            packed[:1],
            num_decodes=num_decodes,
            num_chunks=num_chunks,
            num_tokens=num_tokens,
            max_query_len=num_tokens,
            table_width=table_width,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """A step on this worker."""

    rows: StepRows
    packed: torch.Tensor | None  # those rows as `RowLayout` has them; None: it only decodes
    sampled_slots: list[int]
    sampled_slots_R: torch.Tensor  # int64, the same on the device
    sampled_rows_R: torch.Tensor | None  # int64: which of the step's tokens; None: it only decodes, and all are
    max_kv_len: int


_BEYOND = 1 << 30
"""A start beyond all tokens."""


class _Decoding(NamedTuple):
    """Who decoded last: a decode group stays the same for many steps."""

    packed: bytes
    slots_S: torch.Tensor  # int32
    slots_as_index_S: torch.Tensor  # int64
    slots: list[int]


class SlotTable:
    """The rows of all slots on this worker; one more than there are, for padding."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._lengths = np.zeros(num_slots, np.int64)  # tokens whose keys and values are in the cache
        self._num_blocks = np.zeros(num_slots, np.int64)
        self._prompts: list[Ints] = [np.zeros(0, np.int32)] * num_slots
        self.padding_slot = num_slots
        self.width = -(-max_model_len // block_size)
        self.layout = RowLayout(num_slots)
        # Graphs own only what is made while they are captured: what else they read must outlive them.
        self._one_each = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        nobody = self._one_each[:0]
        self._decoding = _Decoding(b"", nobody, nobody.long(), [])
        self.state = SlotState(
            torch.zeros(num_slots + 1, self.width, dtype=torch.int32, device=device),
            torch.zeros(num_slots + 1, dtype=torch.int32, device=device),
            torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
        )

    def prompt(self, slot: int) -> Ints:
        """The tokens that a slot came with: its prompt, after a preemption its outputs too."""
        return self._prompts[slot]

    def take(self, step: Step) -> Work:
        """Take in a step's deltas, in one copy to the device."""
        return self._take_mixed(step) if step.chunks else self._take_decodes(step)

    def _take_decodes(self, step: Step) -> Work:
        """A step without prompts: who decodes is sent only if it is not who did before."""
        slots = np.frombuffer(step.decode_slots, np.int32)
        self._lengths[slots] += 1
        if step.grown:
            set_blocks(self.state.block_tables_NW, self._send(self._new_entries(step))[0].view(-1, 3))
        if step.decode_slots != self._decoding.packed:
            (slots_S,) = self._send(slots)
            self._decoding = _Decoding(step.decode_slots, slots_S, slots_S.long(), slots.tolist())
        decoding, max_kv_len = self._decoding, int(self._lengths[slots].max())
        rows = self.decode_rows(decoding.slots_S, table_width=-(-max_kv_len // self._block_size))
        return Work(rows, None, decoding.slots, decoding.slots_as_index_S, None, max_kv_len)

    def decode_rows(self, slots_S: torch.Tensor, *, table_width: int) -> StepRows:
        """The rows of a step in which each of these slots (int32 on the device) has one token."""
        num = slots_S.numel()
        return StepRows(
            slots_S,
            slots_S,  # a decode has no start
            self._one_each[: num + 1],
            slots_S[:0],
            self._one_each[num : num + 1],
            num_decodes=num,
            num_chunks=0,
            num_tokens=num,
            max_query_len=1,
            table_width=table_width,
        )

    def _take_mixed(self, step: Step) -> Work:
        for admission in step.admissions:
            self._num_blocks[admission.slot] = 0
            self._prompts[admission.slot] = np.array(admission.token_ids, np.int32)
        decodes = np.frombuffer(step.decode_slots, np.int32)
        chunks = np.array([(c.slot, c.start, c.num_tokens) for c in step.chunks], np.int32).reshape(-1, 3)
        num_decodes, num_rows = decodes.size, decodes.size + len(chunks)
        slots = np.concatenate((decodes, chunks[:, 0]))
        counts = np.ones(num_rows, np.int32)
        counts[num_decodes:] = chunks[:, 2]
        self._lengths[decodes] += 1
        self._lengths[chunks[:, 0]] = chunks[:, 1] + chunks[:, 2]
        query_starts = np.zeros(num_rows + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        finals = [index for index, chunk in enumerate(step.chunks, start=num_decodes) if chunk.final]
        sampled = np.concatenate((decodes, slots[finals]))
        starts = np.concatenate((np.zeros(num_decodes, np.int32), chunks[:, 1]))
        packed, entries, sampled_R, sampled_rows_R = self._send(
            self.layout.pack(slots, starts, query_starts, self._prompt_tokens(step), num_decodes=num_decodes),
            self._new_entries(step),
            sampled,
            np.concatenate((np.arange(num_decodes, dtype=np.int32), query_starts[1:][finals] - 1)),
        )
        if entries.numel():
            set_blocks(self.state.block_tables_NW, entries.view(-1, 3))
        max_kv_len = int(self._lengths[slots].max())
        rows = self.layout.rows(
            packed,
            num_rows=num_rows,
            num_decodes=num_decodes,
            num_chunks=len(chunks),
            num_tokens=int(query_starts[-1]),
            table_width=-(-max_kv_len // self._block_size),
        )
        return Work(
            rows._replace(max_query_len=int(counts.max())),
            packed,
            sampled.tolist(),
            sampled_R.long(),
            sampled_rows_R.long(),
            max_kv_len,
        )

    def _new_entries(self, step: Step) -> Ints:
        """New blocks as (slot, index, block) triples."""
        entries: list[tuple[int, int, int]] = []
        for chunk in step.chunks:
            first = int(self._num_blocks[chunk.slot])
            entries += [(chunk.slot, index, block) for index, block in enumerate(chunk.blocks, start=first)]
            self._num_blocks[chunk.slot] += len(chunk.blocks)
        for slot, block in step.grown:
            entries.append((slot, int(self._num_blocks[slot]), block))
            self._num_blocks[slot] += 1
        return np.array(entries, np.int32).reshape(-1)

    def _prompt_tokens(self, step: Step) -> Ints:
        parts = [self._prompts[chunk.slot][chunk.start : chunk.start + chunk.num_tokens] for chunk in step.chunks]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _send(self, *parts: Ints) -> Sequence[torch.Tensor]:
        """All arrays in one copy."""
        packed = torch.from_numpy(np.concatenate(parts))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return torch.split(packed, [part.size for part in parts])
