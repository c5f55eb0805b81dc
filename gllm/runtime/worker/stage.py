"""One rank's part of every step: inputs in, layers, hidden states or sampled tokens out.

Steps arrive ahead of time, and on a GPU the host only launches: it waits for nothing. A stage's device waits for hidden
states, the first one's for the tokens that the last one sampled, which go straight back to it, never through the
engine. A step's report is made when its tokens have arrived on the host (`outbox`), while later steps run.

Shapes: T tokens, S sequences, R sampled rows, D hidden size.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from gllm_kernels.chunk_plan import plan_chunks
from gllm_kernels.decode_plan import plan_decode
from gllm_kernels.step_inputs import StepRows, lay_out

from gllm.graph_sizes import graph_sizes, has_token_graphs, token_graph_sizes
from gllm.runtime.attention_batch import AttentionBatch, KVCache, allocate_caches
from gllm.runtime.messages import StageTime, StepDone
from gllm.runtime.worker.arrival import Arrival
from gllm.runtime.worker.clock import StageClock
from gllm.runtime.worker.graphs import DecodeGraphs, GraphPool, TokenGraphs
from gllm.runtime.worker.inputs import SlotTable
from gllm.runtime.worker.memory import MAX_SAMPLED
from gllm.runtime.worker.sampler import Sampled, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm_kernels.chunk_plan import ChunkPlan
    from gllm_kernels.decode_plan import DecodePlan
    from gllm_kernels.step_inputs import StepInputs
    from torch import Tensor

    from gllm.core import Limits
    from gllm.runtime.messages import Report, Step
    from gllm.runtime.models.stage import StageModel
    from gllm.runtime.outputs import Logprobs
    from gllm.runtime.worker.clock import Stamp
    from gllm.runtime.worker.groups import Neighbours
    from gllm.runtime.worker.inputs import Work

    Later = Callable[[Callable[[], Report]], None]


class _Awaited(NamedTuple):
    """Sampled tokens that the last stage sends back."""

    plan: int
    slots_R: Tensor


class Stage:
    """A rank that has its weights, and makes its cache.

    Args:
        model: this rank's layers.
        neighbours: the stages before and after.
        stage: which one this is.
        limits: of the engine.
        backend: of attention (`gllm_kernels.paged_attention`).
        report: takes what makes a report, to be called when the device may be waited for; None: another rank of the
            stage speaks for it.
        keeps_time: report when each step was computed.
    """

    def __init__(
        self,
        model: StageModel,
        neighbours: Neighbours,
        *,
        stage: int,
        limits: Limits,
        backend: str = "torch",
        report: Later | None,
        keeps_time: bool = True,
    ) -> None:
        self.model, self._neighbours, self._stage = model, neighbours, stage
        self._report = report
        self._max_in_flight = limits.max_in_flight
        self._max_num_seqs, self._max_model_len = limits.max_num_seqs, limits.max_model_len
        self._block_size, self._backend = limits.block_size, backend
        shard, device = model.shard, model.device
        self.caches: list[KVCache] = allocate_caches(
            model.config,
            shard,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            dtype=model.dtype,
            device=device,
        )
        self._table = SlotTable(limits.max_num_seqs, limits.max_model_len, limits.block_size, device)
        self._clock = StageClock(device) if keeps_time and report is not None else None
        self._awaited: deque[_Awaited] = deque()
        self._sampler = Sampler(limits.max_num_seqs, model.config.shape.vocab_size, device) if shard.is_last else None
        self._prompt_logprobs: dict[int, int] = {}  # slot -> how many alternatives its prompt's tokens are told with
        self._decode_graphs: DecodeGraphs | None = None
        self._token_graphs: TokenGraphs | None = None

    @torch.inference_mode()
    def capture(self, max_tokens: int) -> None:
        """Capture steps of so many tokens and fewer as CUDA graphs; all ranks of a stage at the same time."""
        pool = GraphPool()
        if has_token_graphs(self._backend):
            self._token_graphs = self._capture_tokens(pool, max_tokens)
        self._decode_graphs = self._capture_decodes(pool)

    def _capture_tokens(self, pool: GraphPool, max_tokens: int) -> TokenGraphs:
        model, table = self.model, self._table
        return TokenGraphs(
            lambda rows, hidden_TD: self._compute(rows, hidden_TD, max_kv_len=self._max_model_len),
            token_graph_sizes(max_tokens, model.config.shape, model.shard.tp_size),
            pool=pool,
            layout=table.layout,
            num_slots=self._max_num_seqs,
            table_width=table.width,
            hidden_size=None if model.shard.is_first else model.config.shape.hidden_size,
            dtype=model.dtype,
            device=model.device,
        )

    def _capture_decodes(self, pool: GraphPool) -> DecodeGraphs:
        model = self.model

        def compute(slots_S: Tensor, hidden_SD: Tensor | None) -> Tensor:
            rows = self._table.decode_rows(slots_S, table_width=self._table.width)
            return self._compute(rows, hidden_SD, max_kv_len=self._max_model_len)

        def choose(slots_S: Tensor, x_SD: Tensor) -> Tensor:
            assert self._sampler is not None
            slots_S = slots_S.long()
            tokens_S = self._sampler.choose_plain(model.logits(x_SD), slots_S)
            if self._neighbours.tokens is None:
                self._table.state.last_tokens_N[slots_S] = tokens_S
            return tokens_S

        return DecodeGraphs(
            compute,
            choose if model.shard.is_last else None,
            graph_sizes(self._max_num_seqs),
            pool=pool,
            padding_slot=self._table.padding_slot,
            hidden_size=None if model.shard.is_first else model.config.shape.hidden_size,
            dtype=model.dtype,
            device=model.device,
        )

    @torch.inference_mode()
    def rehearse(self, num_tokens: int) -> None:
        """Compute a step of so many prompt tokens, and sample as many rows as are ever sampled at once.

        Nothing of it stays: all its keys go to the first block, which nobody has yet.
        """
        model, device = self.model, self.model.device
        longest = min(num_tokens, self._max_model_len)
        num_rows = -(-num_tokens // longest)
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * longest
        rows = StepRows(
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            starts.clamp(max=num_tokens),
            torch.zeros(num_tokens, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            num_decodes=0,
            num_chunks=num_rows,
            num_tokens=num_tokens,
            max_query_len=longest,
            table_width=self._table.width,
        )
        hidden_TD = None
        if not model.shard.is_first:
            hidden_TD = torch.zeros(num_tokens, model.config.shape.hidden_size, dtype=model.dtype, device=device)
        x_TD = self._compute(rows, hidden_TD, max_kv_len=longest)
        if self._sampler is not None:
            num_sampled = min(self._max_num_seqs, num_tokens, MAX_SAMPLED)
            slots_R = torch.full((num_sampled,), self._table.padding_slot, device=device)
            self._sampler.rehearse(model.logits(x_TD[:num_sampled]), slots_R)

    @torch.inference_mode()
    def run(self, step: Step) -> None:
        """Compute this rank's part of a step."""
        work = self._table.take(step)
        self._admit(step)
        hidden_TD = None
        if self.model.shard.is_first:
            self._feed_in(step)
        else:
            hidden_TD = self._received(work.rows.num_tokens)
        start = self._stamp()
        x_TD = self._run_layers(work, hidden_TD)
        head = self._stamp()
        if self._sampler is None:
            assert self._neighbours.after is not None
            self._neighbours.after.send(x_TD)
            self._tell_time(step.plan, start, head, head)
        else:
            make = self._sample(step, work, x_TD, self._sampler)
            self._tell_time(step.plan, start, head, self._stamp())
            if self._report is not None:
                self._report(make)
        if self.model.shard.is_first and work.sampled_slots and self._neighbours.tokens is not None:
            self._awaited.append(_Awaited(step.plan, work.sampled_slots_R))

    def _run_layers(self, work: Work, hidden_TD: Tensor | None) -> Tensor:
        """By a graph where one takes the step."""
        rows, decode_graphs, token_graphs = work.rows, self._decode_graphs, self._token_graphs
        if work.packed is None and decode_graphs is not None and rows.num_decodes <= decode_graphs.largest:
            x_TD = decode_graphs.replay(rows.slots_S, hidden_TD)
        elif work.packed is not None and token_graphs is not None and token_graphs.takes(rows):
            x_TD = token_graphs.replay(work.packed, rows.num_tokens, hidden_TD)
        else:
            return self._compute(rows, hidden_TD, max_kv_len=work.max_kv_len)
        # What goes to another GPU must not be overwritten on its way.
        return x_TD.clone() if self._sampler is None else x_TD

    def _compute(self, rows: StepRows, hidden_TD: Tensor | None, *, max_kv_len: int) -> Tensor:
        """Lay out the step, embed its tokens if nobody has, and run the layers."""
        inputs = lay_out(self._table.state, rows, block_size=self._block_size)
        decode_plan, chunk_plan = self._plan_attention(rows, inputs)
        batch = AttentionBatch(
            positions_T=inputs.positions_T,
            slot_mapping_T=inputs.slot_mapping_T,
            query_starts=rows.query_starts,
            kv_lens_S=inputs.kv_lens_S,
            block_tables_SB=inputs.block_tables_SB,
            num_decodes=rows.num_decodes,
            max_query_len=rows.max_query_len,
            max_kv_len=max_kv_len,
            decode_plan=decode_plan,
            chunk_plan=chunk_plan,
            backend=self._backend,
        )
        if hidden_TD is None:
            hidden_TD = self.model.embed(inputs.token_ids_T)
        x_TD: Tensor = self.model(hidden_TD, batch, self.caches)
        return x_TD

    def _plan_attention(self, rows: StepRows, inputs: StepInputs) -> tuple[DecodePlan | None, ChunkPlan | None]:
        """How all layers share out attention, where kernels do that."""
        decode_plan = chunk_plan = None
        if self._backend == "torch":
            return None, None
        shape, shard = self.model.config.shape, self.model.shard
        num_heads, num_kv_heads = shape.num_heads // shard.tp_size, shape.kv_heads_on(shard.tp_size)
        if rows.num_decodes:
            decode_plan = plan_decode(
                inputs.kv_lens_S[: rows.num_decodes],
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=shape.head_dim,
                dtype=self.model.dtype,
                num_decodes_1=rows.num_decodes_1,
                for_later=True,
            )
        if rows.num_chunks and self._backend == "triton":
            chunk_plan = plan_chunks(
                rows.query_starts,
                inputs.kv_lens_S,
                rows.num_decodes_1,
                max_tokens=rows.num_tokens,
                max_chunks=rows.num_chunks,
                group_size=num_heads // num_kv_heads,
                num_kv_heads=num_kv_heads,
                head_dim=shape.head_dim,
                dtype=self.model.dtype,
            )
        return decode_plan, chunk_plan

    def _admit(self, step: Step) -> None:
        if self._sampler is None or not step.admissions:
            return
        self._sampler.add_all(step.admissions)
        for new in step.admissions:
            self._prompt_logprobs.pop(new.slot, None)
            if new.params.prompt_logprobs is not None and len(new.token_ids) == new.num_prompt_tokens:
                self._prompt_logprobs[new.slot] = new.params.prompt_logprobs

    def _feed_in(self, step: Step) -> None:
        """Take the tokens that this step's decodes need from the last stage."""
        # Beyond the pipeline's length they are surely sent, though nobody may ever feed them in: let none pile up.
        newest = max(step.depends_on, step.plan - self._max_in_flight)
        while self._awaited and self._awaited[0].plan <= newest:
            slots_R = self._awaited.popleft().slots_R
            # In the order of plans: a slot that another sequence took since gets that one's tokens later.
            assert self._neighbours.tokens is not None
            self._table.state.last_tokens_N[slots_R] = self._neighbours.tokens.receive(torch.empty_like(slots_R))

    def _received(self, num_tokens: int) -> Tensor:
        assert self._neighbours.before is not None
        size = num_tokens, self.model.config.shape.hidden_size
        return self._neighbours.before.receive(torch.empty(size, dtype=self.model.dtype, device=self.model.device))

    def _sample_plain(
        self,
        step: Step,
        work: Work,
        x_TD: Tensor,
        graphs: DecodeGraphs,
        told: list[tuple[int, list[Logprobs]]] | None,
    ) -> Callable[[], StepDone]:
        """As `_sample`, by a graph, which also keeps the tokens where they are fed in on this device."""
        if work.sampled_rows_R is None:
            tokens_R = graphs.choose(len(work.sampled_slots))
        else:
            tokens_R = graphs.choose_among(x_TD, work.sampled_rows_R, work.sampled_slots_R)
        if self._neighbours.tokens is not None:
            self._neighbours.tokens.send(tokens_R.clone())
        arrived = Arrival(tokens_R)
        return lambda: StepDone(step.plan, arrived.wait(), None, told)

    def _sample(self, step: Step, work: Work, x_TD: Tensor, sampler: Sampler) -> Callable[[], StepDone]:
        """Choose tokens and send them to where they are fed in; what is returned waits for them."""
        told = self._tell_prompts(step, x_TD, sampler)
        slots, graphs = work.sampled_slots, self._decode_graphs
        if not slots:
            return lambda: StepDone(step.plan, b"", None, told)
        if graphs is not None and len(slots) <= graphs.largest and sampler.is_plain(slots):
            return self._sample_plain(step, work, x_TD, graphs, told)
        x_RD = x_TD if work.sampled_rows_R is None else x_TD[work.sampled_rows_R]
        # In parts, so that the logits of a large batch never exist all at once.
        parts = [
            self._choose(sampler, x_RD[part], slots[part], work.sampled_slots_R[part]) for part in _parts(len(slots))
        ]
        tokens_R = parts[0].tokens_S if len(parts) == 1 else torch.cat([part.tokens_S for part in parts])
        if self._neighbours.tokens is None:
            self._table.state.last_tokens_N[work.sampled_slots_R] = tokens_R
        else:
            self._neighbours.tokens.send(tokens_R)
        arrived = Arrival(tokens_R)
        return lambda: StepDone(step.plan, arrived.wait(), _logprobs(parts), told)

    def _choose(self, sampler: Sampler, x_RD: Tensor, slots: list[int], slots_R: Tensor) -> Sampled:
        logits_RV = self.model.logits(x_RD)
        if sampler.is_plain(slots):
            return Sampled(sampler.choose_plain(logits_RV, slots_R))
        return sampler(logits_RV, slots, slots_R)

    def _tell_prompts(self, step: Step, x_TD: Tensor, sampler: Sampler) -> list[tuple[int, list[Logprobs]]] | None:
        """How likely the prompt's own tokens were, for those who asked."""
        if not self._prompt_logprobs:
            return None
        told = []
        at = step.num_decodes
        for number, chunk in enumerate(step.chunks):
            wanted = self._prompt_logprobs.get(chunk.slot)
            following = self._table.prompt(chunk.slot)[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            if wanted is not None and following.size:
                next_ids = torch.from_numpy(following.copy()).long().to(self.model.device)
                x_RD = x_TD[at : at + following.size]
                entries: list[Logprobs] = []
                for part in _parts(following.size):
                    entries += sampler.prompt_logprobs(self.model.logits(x_RD[part]), next_ids[part], wanted)
                told.append((number, entries))
            at += chunk.num_tokens
        return told

    def _stamp(self) -> Stamp:
        return 0 if self._clock is None else self._clock.stamp()

    def _tell_time(self, plan: int, *stamps: Stamp) -> None:
        """Of a step's start, head and end, in the order in which they were made."""
        clock = self._clock
        if clock is not None and self._report is not None:
            self._report(lambda: StageTime(plan, self._stage, *map(clock.read_ns, stamps)))


def _parts(num_rows: int) -> list[slice]:
    """Rows that pass the head together."""
    return [slice(start, start + MAX_SAMPLED) for start in range(0, num_rows, MAX_SAMPLED)]


def _logprobs(parts: list[Sampled]) -> list[Logprobs | None] | None:
    """By row, where asked for; None if no row asked."""
    told = [part.logprobs or [None] * len(part.tokens_S) for part in parts]
    found = [entry for entries in told for entry in entries]
    return found if any(entry is not None for entry in found) else None
