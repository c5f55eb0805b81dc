"""Tokens from logits, for sequences that come and go: `Sampler` keeps what each slot's request asked for.

The host knows which operations a batch needs, so a batch of plain rows pays for none of the others; and each
operation touches only the rows that asked for it, so a row's token is the one it would get alone.

Shapes: S rows (sequences) of a micro-batch, Q those of them that need an operation, R rows of a prompt,
V vocabulary, C sequences with penalties, M (row, token) pairs, N slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from gllm_kernels import sampling
from torch import Tensor

from gllm.runtime.outputs import Logprobs, TokenLogprob
from gllm.runtime.sampling_params import MAX_LOGPROBS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gllm.runtime.sampling_params import SamplingParams

_MAX_TEMPERATURE = 1e30  # beyond it every choice is even; infinity would turn a masked logit into NaN


class _Column:
    """What stands where in a slot's row of numbers."""

    TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)
    SEED, STEP, TOP_K = range(3)


@dataclass(slots=True, kw_only=True)
class _Slot:
    """What the host knows of the request in a slot."""

    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    num_outputs: int
    is_random: bool
    needs_filter: bool
    needs_penalties: bool
    bias: tuple[tuple[int, float], ...]

    @property
    def masked(self) -> tuple[int, ...]:
        """Tokens that would end the answer too early."""
        return self.stop_token_ids if self.num_outputs < self.params.min_tokens else ()


class _Rows(NamedTuple):
    """Some rows of a batch: where they are, and the slots they belong to."""

    places: list[int]
    where: Tensor | slice  # the same, to index with; a slice if it is all of them
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one micro-batch."""

    tokens_S: Tensor  # int64, on the device
    _top: sampling.TopLogprobs | None = None  # rows that asked
    _nums: tuple[int | None, ...] = ()  # by row of the batch: how many alternatives; None: not asked

    @property
    def logprobs(self) -> list[Logprobs | None] | None:
        """By row, where asked for; None if no row asked. Waits for the device."""
        if self._top is None:
            return None
        listed = iter(_listed(self._top, [num for num in self._nums if num is not None]))
        return [None if num is None else next(listed) for num in self._nums]


class Sampler:
    """The requests in the slots of one last-stage worker, and how their tokens are chosen.

    Args:
        num_slots: sequences that may be there at once.
        vocab_size: columns of the logits.
        device: where logits and state live.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._slots: list[_Slot | None] = [None] * num_slots
        self._floats_N6 = torch.zeros(num_slots, 6, dtype=torch.float32, device=self._device)
        self._ints_N3 = torch.zeros(num_slots, 3, dtype=torch.int64, device=self._device)
        self._histories = _Histories(vocab_size, self._device)

    def add(  # noqa: PLR0917 - what a sequence is, in the order of its life
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        stop_token_ids: Iterable[int],
    ) -> None:
        """Give the slot to a sequence, new or back from a preemption with its output so far.

        `seed` is the answer's own (64 bits); `stop_token_ids` are all tokens that end it, which `min_tokens` shuts out.
        """
        self._slots[slot] = _Slot(
            params=params,
            stop_token_ids=tuple(stop_token_ids),
            num_outputs=len(output_token_ids),
            is_random=not params.is_greedy,
            needs_filter=params.needs_filter,
            needs_penalties=params.needs_penalties,
            bias=tuple((params.logit_bias or {}).items()),
        )
        self._floats_N6[slot] = _to_device(_floats(params), torch.float32, self._device)
        self._ints_N3[slot] = _to_device(_ints(params, seed, len(output_token_ids)), torch.int64, self._device)
        self._histories.drop(slot)
        if params.needs_penalties:
            self._histories.add(slot, prompt_token_ids, output_token_ids)

    def __call__(self, logits_SV: Tensor, slots: Sequence[int], slots_S: Tensor) -> Sampled:
        """The next token of each row.

        Args:
            logits_SV: float32, as the model gave them; they are left as they are.
            slots: of the rows, each at most once.
            slots_S: the same, int64 on the device.
        """
        states = [self._state(slot) for slot in slots]
        logits_as_given_SV = logits_SV
        logits_SV = self._with_bias_and_masks(logits_SV, states)
        penalised = self._rows(slots_S, [state.needs_penalties for state in states])
        if penalised is not None:
            logits_SV = self._with_penalties(logits_SV, penalised, slots)
        tokens_S = self._choose(logits_SV, states, slots_S)
        if penalised is not None:
            self._histories.count([slots[place] for place in penalised.places], tokens_S[penalised.where])
        for state in states:
            state.num_outputs += 1
        return self._sampled(logits_as_given_SV, tokens_S, states, slots_S)

    def prompt_logprobs(self, logits_RV: Tensor, next_token_ids_R: Tensor, num: int) -> list[Logprobs]:
        """What the model thought of the prompt tokens that follow these rows, with `num` alternatives."""
        top = sampling.top_logprobs(logits_RV, next_token_ids_R.long(), num)
        return _listed(top, [num] * len(logits_RV))

    def _state(self, slot: int) -> _Slot:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is empty"
        return state

    def _rows(self, slots_S: Tensor, needed: Sequence[bool]) -> _Rows | None:
        """The rows that need an operation; None if none does."""
        places = [place for place, is_needed in enumerate(needed) if is_needed]
        if not places:
            return None
        where = slice(None) if len(places) == len(needed) else self._index(places)
        return _Rows(places, where, slots_S[where])

    def _with_bias_and_masks(self, logits_SV: Tensor, states: list[_Slot]) -> Tensor:
        """Logits, copied where a request moves or shuts out some."""
        biased = [(row, token, bias) for row, state in enumerate(states) for token, bias in state.bias]
        masked = [(row, token) for row, state in enumerate(states) for token in state.masked]
        if not biased and not masked:
            return logits_SV
        logits_SV = logits_SV.clone()
        if biased:
            rows, tokens, biases = zip(*biased, strict=True)
            sampling.add_bias(
                logits_SV, self._index(rows), self._index(tokens), _to_device(biases, torch.float32, self._device)
            )
        if masked:
            rows, tokens = zip(*masked, strict=True)
            sampling.mask_tokens(logits_SV, self._index(rows), self._index(tokens))
        return logits_SV

    def _with_penalties(self, logits_SV: Tensor, rows: _Rows, slots: Sequence[int]) -> Tensor:
        """Logits after the penalties of the rows that have some."""
        counts_QV, in_prompt_QV = self._histories.read([slots[place] for place in rows.places])
        floats_Q6 = self._floats_N6[rows.slots]
        penalised_QV = sampling.penalize(
            logits_SV[rows.where],
            counts_QV,
            in_prompt_QV,
            repetition_S=floats_Q6[:, _Column.REPETITION],
            frequency_S=floats_Q6[:, _Column.FREQUENCY],
            presence_S=floats_Q6[:, _Column.PRESENCE],
        )
        return _replaced(logits_SV, rows.where, penalised_QV)

    def _choose(self, logits_SV: Tensor, states: list[_Slot], slots_S: Tensor) -> Tensor:
        """The likeliest token of greedy rows, a draw for the others."""
        drawn = self._rows(slots_S, [state.is_random for state in states])
        if drawn is None:
            return logits_SV.argmax(dim=-1)
        tokens_Q = self._draw(logits_SV[drawn.where], [states[place] for place in drawn.places], drawn.slots)
        if len(drawn.places) == len(states):
            return tokens_Q
        return _replaced(logits_SV.argmax(dim=-1), drawn.where, tokens_Q)

    def _draw(self, logits_QV: Tensor, states: list[_Slot], slots_Q: Tensor) -> Tensor:
        """A token for each of these rows, by its temperature and filters."""
        scaled_QV = logits_QV / self._floats_N6[slots_Q, _Column.TEMPERATURE, None]
        filtered = self._rows(slots_Q, [state.needs_filter for state in states])
        if filtered is not None:
            floats_F6, top_k_F = self._floats_N6[filtered.slots], self._ints_N3[filtered.slots, _Column.TOP_K]
            kept_FV = sampling.keep_likely(
                scaled_QV[filtered.where],
                top_k_S=top_k_F,
                top_p_S=floats_F6[:, _Column.TOP_P],
                min_p_S=floats_F6[:, _Column.MIN_P],
            )
            scaled_QV = _replaced(scaled_QV, filtered.where, kept_FV)
        ints_Q3 = self._ints_N3[slots_Q]
        self._ints_N3[slots_Q, _Column.STEP] += 1
        return sampling.draw(scaled_QV, ints_Q3[:, _Column.SEED], ints_Q3[:, _Column.STEP])

    def _sampled(self, logits_SV: Tensor, tokens_S: Tensor, states: list[_Slot], slots_S: Tensor) -> Sampled:
        """The tokens, with log-probabilities for the rows that asked."""
        nums = tuple(state.params.logprobs for state in states)
        asked = self._rows(slots_S, [num is not None for num in nums])
        if asked is None:
            return Sampled(tokens_S)
        # All or none: how many the other rows want must not decide which of two equal tokens a row gets to see.
        num_top = MAX_LOGPROBS if any(nums) else 0
        top = sampling.top_logprobs(logits_SV[asked.where], tokens_S[asked.where], num_top)
        return Sampled(tokens_S, top, nums)

    def _index(self, values: Sequence[int]) -> Tensor:
        return _to_device(values, torch.int64, self._device)


class _Histories:
    """For sequences that pay penalties: which tokens the prompt holds, and how often the output does."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._counts_CV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt_CV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def add(self, slot: int, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        """Start the slot's history with what is there already."""
        if not self._free:
            self._grow()
        row = self._row_of[slot] = self._free.pop()
        device = self._counts_CV.device
        self._in_prompt_CV[row] = False
        self._in_prompt_CV[row, _to_device(prompt_token_ids, torch.int64, device)] = True
        outputs = _to_device(output_token_ids, torch.int64, device)
        self._counts_CV[row] = 0
        self._counts_CV[row].index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it was there."""
        if slot in self._row_of:
            self._free.append(self._row_of.pop(slot))

    def read(self, slots: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Counts in the output (int32) and presence in the prompt (bool), a row a slot."""
        rows = self._rows(slots)
        return self._counts_CV[rows], self._in_prompt_CV[rows]

    def count(self, slots: Iterable[int], tokens_Q: Tensor) -> None:
        """Add one token to each slot's output."""
        self._counts_CV[self._rows(slots), tokens_Q] += 1

    def _rows(self, slots: Iterable[int]) -> Tensor:
        return _to_device([self._row_of[slot] for slot in slots], torch.int64, self._counts_CV.device)

    def _grow(self) -> None:
        """Twice the room; a history is large, and few requests have penalties."""
        num_rows = len(self._counts_CV)
        num_more = max(1, num_rows)
        self._free = list(range(num_rows, num_rows + num_more))
        self._counts_CV = torch.cat((self._counts_CV, self._counts_CV.new_zeros(num_more, self._counts_CV.shape[1])))
        self._in_prompt_CV = torch.cat(
            (self._in_prompt_CV, self._in_prompt_CV.new_zeros(num_more, self._in_prompt_CV.shape[1]))
        )


def _floats(params: SamplingParams) -> list[float]:
    """A slot's row, by `_Column`."""
    return [
        min(params.temperature, _MAX_TEMPERATURE),
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    ]


def _ints(params: SamplingParams, seed: int, step: int) -> list[int]:
    """A slot's row, by `_Column`; an unsigned seed becomes the signed number of the same bits."""
    return [(seed + 2**63) % 2**64 - 2**63, step, params.top_k]


def _to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a list, on its way to the device without anyone waiting."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _replaced(x_S: Tensor, where: Tensor | slice, rows_Q: Tensor) -> Tensor:
    """`x_S` with other values in some rows; the original stays."""
    return rows_Q if isinstance(where, slice) else x_S.index_copy(0, where, rows_Q)


def _listed(top: sampling.TopLogprobs, nums: Sequence[int]) -> list[Logprobs]:
    """Rows of tensors as lists, each with its own number of alternatives."""
    columns = zip(top.token_ids.tolist(), top.logprobs.tolist(), top.ranks.tolist(), strict=True)
    return [
        [TokenLogprob(*each) for each in zip(*(column[: 1 + num] for column in row), strict=True)]
        for row, num in zip(columns, nums, strict=True)
    ]
