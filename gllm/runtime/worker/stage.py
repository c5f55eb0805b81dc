"""One rank's part of every step: inputs in, layers, hidden states or sampled tokens out.

Steps arrive ahead of time, so a stage waits only for hidden states, and the first one for the tokens that the last
one sampled; those go straight back to it, never through the engine.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gllm.runtime.attention_batch import KVCache, allocate_caches
from gllm.runtime.messages import StageTime, StepDone
from gllm.runtime.worker.inputs import SlotTable
from gllm.runtime.worker.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.runtime.messages import Report, Step
    from gllm.runtime.models.stage import StageModel
    from gllm.runtime.outputs import Logprobs
    from gllm.runtime.worker.groups import Neighbours
    from gllm.runtime.worker.inputs import Inputs


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
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        report: Callable[[Report], None] | None,
    ) -> None:
        self._model, self._neighbours, self._stage = model, neighbours, stage
        self._report = report  # None: another rank of the stage speaks for it
        shard, device = model.shard, model.device
        self._caches: list[KVCache] = allocate_caches(
            model.config, shard, num_blocks=num_blocks, block_size=block_size, dtype=model.dtype, device=device
        )
        self._table = SlotTable(max_num_seqs, max_model_len, block_size, device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._awaited: deque[_Awaited] = deque()
        self._sampler = Sampler(max_num_seqs, model.config.shape.vocab_size, device) if shard.is_last else None
        self._prompt_logprobs: dict[int, int] = {}  # slot -> how many alternatives its prompt's tokens are told with

    @torch.inference_mode()
    def run(self, step: Step) -> None:
        """Compute this rank's part of a step."""
        inputs = self._table.inputs(step)
        self._admit(step)
        x_TD = self._first(step, inputs) if self._model.shard.is_first else self._received(inputs.num_tokens)
        start_ns = time.monotonic_ns()
        x_TD = self._model(x_TD, inputs.batch, self._caches)
        if self._sampler is None:
            self._synchronize()
            end_ns = time.monotonic_ns()
            assert self._neighbours.after is not None
            self._neighbours.after.send(x_TD)
            self._tell(StageTime(step.plan, self._stage, start_ns, end_ns))
        else:
            done = self._sample(step, inputs, x_TD, self._sampler)
            self._tell(StageTime(step.plan, self._stage, start_ns, time.monotonic_ns()))
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
        while self._awaited and self._awaited[0].plan <= step.depends_on:
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
            self._synchronize()
            return StepDone(step.plan, b"", None, told)
        logits_RV = self._model.logits(x_TD[inputs.sampled_rows_R])
        slots = torch.tensor(inputs.sampled_slots, device=self._model.device)
        sampled = sampler(logits_RV, inputs.sampled_slots, slots)
        tokens = sampled.tokens_S.to(torch.int64)
        if self._neighbours.tokens is None:
            self._last_tokens[slots] = tokens
        else:
            self._neighbours.tokens.send(tokens)
        # The only wait of a step: for the tokens themselves.
        return StepDone(step.plan, tokens.to(torch.int32).cpu().numpy().tobytes(), sampled.logprobs, told)

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
                logits_RV = self._model.logits(x_TD[at : at + following.size])
                told.append((number, sampler.prompt_logprobs(logits_RV, next_ids, wanted)))
            at += chunk.num_tokens
        return told

    def _tell(self, report: Report) -> None:
        if self._report is not None:
            self._report(report)

    def _synchronize(self) -> None:
        """So that a stage's time is the time of its work, not of its launch."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
