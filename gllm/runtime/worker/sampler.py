"""Tokens from logits, for sequences that come and go: `Sampler` keeps what each slot's request asked for.

What every request has (temperature, seed, step, filters) stands in columns on the device, read there by slot; so a
batch of plain rows is one operation, which a CUDA graph can hold. The host remembers only requests that need more,
and each further operation touches only the rows that asked for it: a row's token is the one it would get alone.

Shapes: S rows (sequences) of a micro-batch, Q those of them that need an operation, R rows of a prompt,
V vocabulary, C sequences with penalties, M (row, token) pairs, N slots and one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from gllm_kernels import sampling
from gllm_kernels.draw import draw
from gllm_kernels.filters import likely_floors
from torch import Tensor

from gllm.runtime.outputs import Logprobs, TokenLogprob
from gllm.runtime.sampling_params import MAX_LOGPROBS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gllm.runtime.messages import Admission
    from gllm.runtime.sampling_params import SamplingParams

_MAX_TEMPERATURE = 1e30  # beyond it every choice is even; infinity would turn a masked logit into NaN


@dataclass(slots=True)
class _Special:
    """A request that needs more than a temperature and a seed, and what the host knows of it."""

    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    num_outputs: int

    @property
    def bias(self) -> Iterable[tuple[int, float]]:
        """Logits to add to, by token."""
        return (self.params.logit_bias or {}).items()

    @property
    def masked(self) -> tuple[int, ...]:
        """Tokens that would end the answer too early."""
        return self.stop_token_ids if self.num_outputs < self.params.min_tokens else ()

    @property
    def changes_logits(self) -> bool:
        """Whether its next token is not chosen by the logits as the model gives them."""
        return self.params.needs_penalties or bool(self.params.logit_bias) or bool(self.masked)


class Sampled:
    """The tokens of one micro-batch, and log-probabilities on their way to the host.

    Args:
        tokens_S: int64, on the device.
        top: log-probabilities, of the rows that asked.
        nums: by row of the batch, how many alternatives; None: not asked.
    """

    def __init__(
        self, tokens_S: Tensor, top: sampling.TopLogprobs | None = None, nums: Sequence[int | None] = ()
    ) -> None:
        self.tokens_S = tokens_S
        self._nums = nums
        self._arrived: torch.cuda.Event | None = None
        self._top = top and sampling.TopLogprobs(*(column.to("cpu", non_blocking=True) for column in top))
        if top is not None and tokens_S.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @property
    def logprobs(self) -> list[Logprobs | None] | None:
        """By row, where asked for; None if no row asked. Waits for the device."""
        if self._top is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        listed = iter(_listed(self._top, [num for num in self._nums if num is not None]))
        return [None if num is None else next(listed) for num in self._nums]


class Sampler:
    """The requests in the slots of one last-stage worker, and how their tokens are chosen.

    Slot `num_slots` belongs to nobody: its rows pad a batch, and take the likeliest token.

    Args:
        num_slots: sequences that may be there at once.
        vocab_size: columns of the logits.
        device: where logits and state live.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._padding_slot = num_slots
        self._special: dict[int, _Special] = {}
        self._histories = _Histories(vocab_size, self._device)
        # As `_columns` lays them out. One tensor a type, so that requests come with one copy.
        self._ints_3N = torch.zeros(3, num_slots + 1, dtype=torch.int64, device=self._device)
        self._floats_6N = torch.zeros(6, num_slots + 1, dtype=torch.float32, device=self._device)
        self._seeds_N, self._steps_N, self._top_k_N = (self._ints_3N[column] for column in range(3))
        self._temperatures_N, self._top_p_N, self._min_p_N = (self._floats_6N[column] for column in range(3))

    def add_all(self, admissions: Sequence[Admission]) -> None:
        """Give slots to sequences, new or back from a preemption with their outputs so far; each slot at most once."""
        if not admissions:
            return
        sent_A7 = _sent(_columns(admissions), self._device)
        slots_A = sent_A7[:, 0]
        self._ints_3N.index_copy_(1, slots_A, sent_A7[:, 1:4].T)
        self._floats_6N.index_copy_(1, slots_A, sent_A7[:, 4:].view(torch.float32).T)
        for new in admissions:
            self._histories.drop(new.slot)
            self._special.pop(new.slot, None)
            if _is_special(new.params):
                prompt, outputs = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
                self._special[new.slot] = _Special(new.params, tuple(new.stop_token_ids), len(outputs))
                if new.params.needs_penalties:
                    self._histories.add(new.slot, prompt, outputs)

    def is_plain(self, slots: Iterable[int]) -> bool:
        """Whether no row of these slots needs more than a temperature and a seed."""
        return not self._special or self._special.keys().isdisjoint(slots)

    def choose_plain(self, logits_SV: Tensor, slots_S: Tensor) -> Tensor:
        """The next token of each row, int64, where `is_plain`; a CUDA graph can hold it.

        Args:
            logits_SV: float32, bfloat16 or float16; rows of the padding slot may follow.
            slots_S: of the rows, int64 on the device.
        """
        return draw(logits_SV, slots_S, self._temperatures_N, self._seeds_N, self._steps_N)

    def rehearse(self, logits_SV: Tensor, slots_S: Tensor) -> None:
        """Take as much memory as rows do that are drawn and told with log-probabilities; nothing comes of it."""
        sampling.top_logprobs(logits_SV, self.choose_plain(logits_SV, slots_S), MAX_LOGPROBS)

    def __call__(self, logits_SV: Tensor, slots: Sequence[int], slots_S: Tensor) -> Sampled:
        """The next token of each row, whatever its request asked for.

        Args:
            logits_SV: float32, bfloat16 or float16, as the model gave them; they are left as they are.
            slots: of the rows, each at most once.
            slots_S: the same, int64 on the device.
        """
        states = [self._special.get(slot) for slot in slots]
        tokens_S = self._choose(logits_SV, slots, slots_S, states)
        for state in states:
            if state is not None:
                state.num_outputs += 1
        return self._sampled(logits_SV, tokens_S, states)

    def prompt_logprobs(self, logits_RV: Tensor, next_token_ids_R: Tensor, num: int) -> list[Logprobs]:
        """What the model thought of the prompt tokens that follow these rows, with `num` alternatives."""
        top = sampling.top_logprobs(logits_RV, next_token_ids_R.long(), num)
        return _listed(top, [num] * len(logits_RV))

    def _choose(
        self, logits_SV: Tensor, slots: Sequence[int], slots_S: Tensor, states: Sequence[_Special | None]
    ) -> Tensor:
        """A token a row: rows whose logits change from copies of their own, in float32, the others where they are."""
        changing = {place: state for place, state in enumerate(states) if state is not None and state.changes_logits}
        if not changing:
            return self._draw(logits_SV, slots_S, states)
        where_Q = self._index(list(changing))
        slots_Q, states_Q = slots_S[where_Q], list(changing.values())
        logits_QV = logits_SV[where_Q].float()
        self._add_bias_and_masks(logits_QV, states_Q)
        tokens_Q = self._draw_penalised(logits_QV, [slots[place] for place in changing], slots_Q, states_Q)
        if len(changing) == len(states):
            return tokens_Q
        others_S = slots_S.index_fill(0, where_Q, self._padding_slot)  # what these rows get here is not theirs
        others = [None if place in changing else state for place, state in enumerate(states)]
        return self._draw(logits_SV, others_S, others).index_copy_(0, where_Q, tokens_Q)

    def _add_bias_and_masks(self, logits_QV: Tensor, states: Sequence[_Special]) -> None:
        """Move and shut out what the requests say, in place."""
        biased = [(row, token, bias) for row, state in enumerate(states) for token, bias in state.bias]
        masked = [(row, token) for row, state in enumerate(states) for token in state.masked]
        if biased:
            rows, tokens, biases = zip(*biased, strict=True)
            biases_M = _to_device(biases, torch.float32, self._device)
            sampling.add_bias(logits_QV, self._index(rows), self._index(tokens), biases_M)
        if masked:
            rows, tokens = zip(*masked, strict=True)
            sampling.mask_tokens(logits_QV, self._index(rows), self._index(tokens))

    def _draw_penalised(
        self, logits_QV: Tensor, slots: Sequence[int], slots_Q: Tensor, states: Sequence[_Special]
    ) -> Tensor:
        """A token a row, after the penalties of those that have some, whose histories it joins."""
        penal = [place for place, state in enumerate(states) if state.params.needs_penalties]
        if not penal:
            return self._draw(logits_QV, slots_Q, states)
        where_P, histories_P = self._index(penal), self._histories.rows([slots[place] for place in penal])
        counts_PV, in_prompt_PV = self._histories.read(histories_P)
        repetition_P, frequency_P, presence_P = self._floats_6N[3:, slots_Q[where_P]]
        penalised_PV = sampling.penalize(
            logits_QV[where_P],
            counts_PV,
            in_prompt_PV,
            repetition_S=repetition_P,
            frequency_S=frequency_P,
            presence_S=presence_P,
        )
        tokens_Q = self._draw(logits_QV.index_copy_(0, where_P, penalised_PV), slots_Q, states)
        self._histories.count(histories_P, tokens_Q[where_P])
        return tokens_Q

    def _draw(self, logits_SV: Tensor, slots_S: Tensor, states: Sequence[_Special | None]) -> Tensor:
        """A token a row, by its temperature and filters."""
        temperatures_N, floors_S = self._temperatures_N, None
        if any(state is not None and state.params.needs_filter for state in states):
            floors_S = likely_floors(logits_SV, slots_S, temperatures_N, self._top_k_N, self._top_p_N, self._min_p_N)
        return draw(logits_SV, slots_S, temperatures_N, self._seeds_N, self._steps_N, floors_S)

    def _sampled(self, logits_SV: Tensor, tokens_S: Tensor, states: Sequence[_Special | None]) -> Sampled:
        """The tokens, with log-probabilities for the rows that asked."""
        nums = [None if state is None else state.params.logprobs for state in states]
        asked = [place for place, num in enumerate(nums) if num is not None]
        if not asked:
            return Sampled(tokens_S)
        where_Q = self._index(asked)
        # All or none: how many the other rows want must not decide which of two equal tokens a row gets to see.
        num_top = MAX_LOGPROBS if any(nums) else 0
        return Sampled(tokens_S, sampling.top_logprobs(logits_SV[where_Q], tokens_S[where_Q], num_top), nums)

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

    def rows(self, slots: Iterable[int]) -> Tensor:
        """Where the slots' histories are; each has one."""
        return _to_device([self._row_of[slot] for slot in slots], torch.int64, self._counts_CV.device)

    def read(self, rows_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Counts in the output (int32) and presence in the prompt (bool)."""
        return self._counts_CV[rows_Q], self._in_prompt_CV[rows_Q]

    def count(self, rows_Q: Tensor, tokens_Q: Tensor) -> None:
        """Add one token to each output."""
        self._counts_CV[rows_Q, tokens_Q] += 1

    def _grow(self) -> None:
        """Twice the room; a history is large, and few requests have penalties."""
        num_rows = len(self._counts_CV)
        num_more = max(1, num_rows)
        self._free = list(range(num_rows, num_rows + num_more))
        self._counts_CV = torch.cat((self._counts_CV, self._counts_CV.new_zeros(num_more, self._counts_CV.shape[1])))
        self._in_prompt_CV = torch.cat(
            (self._in_prompt_CV, self._in_prompt_CV.new_zeros(num_more, self._in_prompt_CV.shape[1]))
        )


def _is_special(params: SamplingParams) -> bool:
    """Whether choosing its tokens takes more than a temperature and a seed."""
    return (
        params.needs_filter
        or params.needs_penalties
        or bool(params.logit_bias)
        or params.min_tokens > 0
        or params.logprobs is not None
    )


def _columns(admissions: Sequence[Admission]) -> Tensor:
    """A row a request, int64 [A, 7] on the host: slot, seed, step, top-k, and six float32 in three numbers."""
    ints = [
        [new.slot, _signed(new.seed), len(new.token_ids) - new.num_prompt_tokens, new.params.top_k]
        for new in admissions
    ]
    floats = [_floats(new.params) for new in admissions]
    floats_A3 = torch.tensor(floats, dtype=torch.float32).view(torch.int64)
    return torch.cat((torch.tensor(ints, dtype=torch.int64), floats_A3), dim=1)


def _floats(params: SamplingParams) -> list[float]:
    """Temperature (0: greedy), top-p, min-p, and the repetition, frequency and presence penalties."""
    return [
        0.0 if params.is_greedy else min(params.temperature, _MAX_TEMPERATURE),
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    ]


def _signed(seed: int) -> int:
    """The signed number of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a list, on its way to the device without anyone waiting."""
    return _sent(torch.tensor(values, dtype=dtype), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way from the host to the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _listed(top: sampling.TopLogprobs, nums: Sequence[int]) -> list[Logprobs]:
    """Rows of tensors as lists, each with its own number of alternatives."""
    columns = zip(top.token_ids.tolist(), top.logprobs.tolist(), top.ranks.tolist(), strict=True)
    return [
        [TokenLogprob(*each) for each in zip(*(column[: 1 + num] for column in row), strict=True)]
        for row, num in zip(columns, nums, strict=True)
    ]
