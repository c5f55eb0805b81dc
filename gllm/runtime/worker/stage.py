"""One rank's part of every step: inputs in, layers, hidden states or sampled tokens out.

Steps arrive ahead of time, so a stage waits only for hidden states, and the first one for the tokens that the last
one sampled; those go straight back to it, never through the engine.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gllm.runtime.attention_batch import KVCache, allocate_caches
from gllm.runtime.messages import StageTime, StepDone
from gllm.runtime.worker.clock import StageClock
from gllm.runtime.worker.inputs import SlotTable
from gllm.runtime.worker.memory import MAX_SAMPLED
from gllm.runtime.worker.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.core import Limits
    from gllm.runtime.messages import Report, Step
    from gllm.runtime.models.stage import StageModel
    from gllm.runtime.outputs import Logprobs
    from gllm.runtime.worker.clock import Stamp
    from gllm.runtime.worker.groups import Neighbours
    from gllm.runtime.worker.inputs import Inputs
    from gllm.runtime.worker.sampler import Sampled


class _Awaited(NamedTuple):
    """Sampled tokens that the last stage sends back."""

    plan: int
    slots: list[int]


class Stage:
    """A rank that has its weights and its cache."""

    def __init__(
        self,
        model: StageModel,
        neighbours: Neighbours,
        *,
        stage: int,
        limits: Limits,
        keeps_time: bool = True,
        report: Callable[[Report], None] | None,
    ) -> None:
        self._model, self._neighbours, self._stage = model, neighbours, stage
        self._report = report  # None: another rank of the stage speaks for it
        self._max_in_flight = limits.max_in_flight
        shard, device = model.shard, model.device
        self._caches: list[KVCache] = allocate_caches(
            model.config,
            shard,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            dtype=model.dtype,
            device=device,
        )
        self._table = SlotTable(limits.max_num_seqs, limits.max_model_len, limits.block_size, device)
        self._last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=device)
        self._clock = StageClock(device) if keeps_time and report is not None else None
        self._awaited: deque[_Awaited] = deque()
        self._sampler = Sampler(limits.max_num_seqs, model.config.shape.vocab_size, device) if shard.is_last else None
        self._prompt_logprobs: dict[int, int] = {}  # slot -> how many alternatives its prompt's tokens are told with

    @torch.inference_mode()
    def run(self, step: Step) -> None:
        """Compute this rank's part of a step."""
        inputs = self._table.inputs(step)
        self._admit(step)
        x_TD = self._first(step, inputs) if self._model.shard.is_first else self._received(inputs.num_tokens)
        start = self._stamp()
        x_TD = self._model(x_TD, inputs.batch, self._caches)
        if self._sampler is None:
            end = self._stamp()
            assert self._neighbours.after is not None
            self._neighbours.after.send(x_TD)
            self._tell_time(step.plan, start, end)
        else:
            done = self._sample(step, inputs, x_TD, self._sampler)
            self._tell_time(step.plan, start, self._stamp())
            self._tell(done)
        if self._model.shard.is_first and inputs.sampled_slots and self._neighbours.tokens is not None:
            self._awaited.append(_Awaited(step.plan, inputs.sampled_slots))

    def _admit(self, step: Step) -> None:
        if self._sampler is None:
            return
        for new in step.admissions:
            prompt, outputs = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
            self._sampler.add(new.slot, new.params, new.seed, prompt, outputs, new.stop_token_ids)
            self._prompt_logprobs.pop(new.slot, None)
            if new.params.prompt_logprobs is not None and not outputs:
                self._prompt_logprobs[new.slot] = new.params.prompt_logprobs

    def _first(self, step: Step, inputs: Inputs) -> torch.Tensor:
        """Embed the step's tokens, the newest ones of its decodes included."""
        # Beyond the pipeline's length they are surely sent, though nobody may ever feed them in: let none pile up.
        newest = max(step.depends_on, step.plan - self._max_in_flight)
        while self._awaited and self._awaited[0].plan <= newest:
            self._take_tokens(self._awaited.popleft().slots)
        if inputs.decode_slots.size:
            slots = torch.from_numpy(inputs.decode_slots.astype(np.int64)).to(self._model.device)
            inputs.token_ids_T[: slots.numel()] = self._last_tokens[slots]
        return self._model.embed(inputs.token_ids_T)

    def _take_tokens(self, slots: list[int]) -> None:
        """In the order of plans: a slot that another sequence took since gets that one's tokens later."""
        assert self._neighbours.tokens is not None
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._model.device)
        self._last_tokens[slots] = self._neighbours.tokens.receive(tokens)

    def _received(self, num_tokens: int) -> torch.Tensor:
        assert self._neighbours.before is not None
        size = num_tokens, self._model.config.shape.hidden_size
        return self._neighbours.before.receive(torch.empty(size, dtype=self._model.dtype, device=self._model.device))

    def _sample(self, step: Step, inputs: Inputs, x_TD: torch.Tensor, sampler: Sampler) -> StepDone:
        told = self._tell_prompts(step, inputs, x_TD, sampler)
        if not inputs.sampled_slots:
            return StepDone(step.plan, b"", None, told)
        slots = inputs.sampled_slots
        x_RD = x_TD[inputs.sampled_rows_R]
        # In parts, so that the logits of a large batch never exist all at once.
        parts = [
            sampler(self._model.logits(x_RD[part]), slots[part], torch.tensor(slots[part], device=self._model.device))
            for part in _parts(len(slots))
        ]
        tokens = torch.cat([part.tokens_S for part in parts]).to(torch.int64)
        if self._neighbours.tokens is None:
            self._last_tokens[slots] = tokens
        else:
            self._neighbours.tokens.send(tokens)
        # The only wait of a step: for the tokens themselves.
        return StepDone(step.plan, tokens.to(torch.int32).cpu().numpy().tobytes(), _logprobs(parts), told)

    def _tell_prompts(
        self, step: Step, inputs: Inputs, x_TD: torch.Tensor, sampler: Sampler
    ) -> list[tuple[int, list[Logprobs]]] | None:
        """How likely the prompt's own tokens were, for those who asked."""
        if not self._prompt_logprobs:
            return None
        told = []
        at = len(inputs.decode_slots)
        for number, chunk in enumerate(step.chunks):
            wanted = self._prompt_logprobs.get(chunk.slot)
            following = self._table.prompt(chunk.slot)[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            if wanted is not None and following.size:
                next_ids = torch.from_numpy(following.copy()).to(self._model.device)
                x_RD = x_TD[at : at + following.size]
                entries: list[Logprobs] = []
                for part in _parts(following.size):
                    entries += sampler.prompt_logprobs(self._model.logits(x_RD[part]), next_ids[part], wanted)
                told.append((number, entries))
            at += chunk.num_tokens
        return told

    def _tell(self, report: Report) -> None:
        if self._report is not None:
            self._report(report)

    def _stamp(self) -> Stamp:
        return 0 if self._clock is None else self._clock.stamp()

    def _tell_time(self, plan: int, start: Stamp, end: Stamp) -> None:
        if self._clock is not None:
            self._tell(StageTime(plan, self._stage, self._clock.read_ns(start), self._clock.read_ns(end)))


def _parts(num_rows: int) -> list[slice]:
    """Rows that pass the head together."""
    return [slice(start, start + MAX_SAMPLED) for start in range(0, num_rows, MAX_SAMPLED)]


def _logprobs(parts: list[Sampled]) -> list[Logprobs | None] | None:
    """By row, where asked for; None if no row asked."""
    told = [part.logprobs or [None] * len(part.tokens_S) for part in parts]
    found = [entry for entries in told for entry in entries]
    return found if any(entry is not None for entry in found) else None
