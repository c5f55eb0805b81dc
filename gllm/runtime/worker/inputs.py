"""From a step's small deltas to the tensors that a forward pass takes.

A worker keeps one row a slot: which blocks its sequence has, how many of its tokens are computed, which tokens it
holds. A step names only what is new. Lengths follow from the steps alone, so all of this is plain numpy on the host.

Shapes: T tokens, S sequences (decodes first, then chunks), R sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gllm.runtime.attention_batch import AttentionBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gllm.runtime.messages import Step


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step computes."""

    batch: AttentionBatch
    num_tokens: int
    token_ids_T: torch.Tensor  # int64; those of decodes are known only where tokens are fed in
    decode_slots: NDArray[np.int32]
    sampled_slots: list[int]
    sampled_rows_R: torch.Tensor  # int64: which of T


class SlotTable:
    """The rows of all slots on this worker."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        width = -(-max_model_len // block_size)
        self._blocks = np.zeros((num_slots, width), np.int32)
        self._num_blocks = np.zeros(num_slots, np.int64)
        self._lengths = np.zeros(num_slots, np.int64)  # tokens whose keys and values are in the cache
        self._prompts: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * num_slots

    def prompt(self, slot: int) -> NDArray[np.int64]:
        """The tokens that a slot came with: its prompt, after a preemption its outputs too."""
        return self._prompts[slot]

    def inputs(self, step: Step) -> Inputs:
        """Take in a step's deltas; lay out its micro-batch."""
        self._apply(step)
        decodes = np.frombuffer(step.decode_slots, np.int32)
        chunk_slots = np.array([chunk.slot for chunk in step.chunks], np.int32)
        starts = np.concatenate([self._lengths[decodes], np.array([chunk.start for chunk in step.chunks], np.int64)])
        counts = np.ones(starts.size, np.int64)
        counts[decodes.size :] = [chunk.num_tokens for chunk in step.chunks]
        slots = np.concatenate([decodes, chunk_slots])
        lengths = starts + counts
        self._lengths[slots] = lengths
        query_starts = np.zeros(slots.size + 1, np.int64)
        np.cumsum(counts, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        positions = np.arange(num_tokens) - np.repeat(query_starts[:-1] - starts, counts)
        owners = np.repeat(slots, counts)
        block = self._blocks[owners, positions // self._block_size]
        max_len = int(lengths.max())
        batch = AttentionBatch(
            positions_T=self._tensor(positions),
            slot_mapping_T=self._tensor(block.astype(np.int64) * self._block_size + positions % self._block_size),
            query_starts=self._tensor(query_starts.astype(np.int32)),
            kv_lens_S=self._tensor(lengths.astype(np.int32)),
            block_tables_SB=self._tensor(self._blocks[slots, : -(-max_len // self._block_size)]),
            num_decodes=decodes.size,
            max_query_len=int(counts.max()),
            max_kv_len=max_len,
        )
        finals = [index for index, chunk in enumerate(step.chunks, start=decodes.size) if chunk.final]
        rows = np.concatenate([np.arange(decodes.size), query_starts[1:][finals] - 1])
        return Inputs(
            batch=batch,
            num_tokens=num_tokens,
            token_ids_T=self._token_ids(step, decodes.size, num_tokens),
            decode_slots=decodes,
            sampled_slots=slots[: decodes.size].tolist() + slots[finals].tolist(),
            sampled_rows_R=self._tensor(rows),
        )

    def _apply(self, step: Step) -> None:
        for admission in step.admissions:
            self._num_blocks[admission.slot] = 0
            self._prompts[admission.slot] = np.array(admission.token_ids, np.int64)
        for chunk in step.chunks:
            first = self._num_blocks[chunk.slot]
            self._blocks[chunk.slot, first : first + len(chunk.blocks)] = chunk.blocks
            self._num_blocks[chunk.slot] += len(chunk.blocks)
        for slot, block in step.grown:
            self._blocks[slot, self._num_blocks[slot]] = block
            self._num_blocks[slot] += 1

    def _token_ids(self, step: Step, num_decodes: int, num_tokens: int) -> torch.Tensor:
        token_ids = np.zeros(num_tokens, np.int64)
        at = num_decodes
        for chunk in step.chunks:
            size = chunk.num_tokens
            token_ids[at : at + size] = self._prompts[chunk.slot][chunk.start : chunk.start + size]
            at += size
        return self._tensor(token_ids)

    def _tensor(self, values: NDArray[np.int32] | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)
