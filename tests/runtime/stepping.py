"""Drive stage models by hand: chunks, decode steps, block tables, ranks as threads."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from gllm.runtime.attention_batch import AttentionBatch, allocate_caches
from gllm.runtime.model_config import load_model_config
from gllm.runtime.models import MODELS
from gllm.runtime.shard import Shard, SoloCommunicator
from gllm.runtime.weights import load_weights

BLOCK_SIZE = 4


class ThreadGroup:
    """One rank's end of a group of threads that meet at barriers."""

    def __init__(self, rank, meeting):
        self.rank = rank
        self.barrier, self.tensors = meeting
        self.size = len(self.tensors)

    def _exchange(self, tensor):
        self.tensors[self.rank] = tensor
        self.barrier.wait(timeout=60)
        everyone = list(self.tensors)
        self.barrier.wait(timeout=60)
        return everyone

    def all_reduce(self, tensor):
        return torch.stack(self._exchange(tensor)).sum(0)

    def all_gather(self, tensor):
        return torch.cat(self._exchange(tensor), -1)


def thread_groups(size):
    """The communicators of a stage of that many ranks."""
    if size == 1:
        return [SoloCommunicator()]
    meeting = threading.Barrier(size), [None] * size
    return [ThreadGroup(rank, meeting) for rank in range(size)]


def on_ranks(size, function):
    """Run function(communicator) on as many threads; their results in order of ranks."""
    groups = thread_groups(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, groups))


def load_stages(folder, *, group=None, ep=1, pp=1, fill=load_weights, dtype=torch.float32):
    """Every pipeline stage of one tensor-parallel rank."""
    config = load_model_config(folder)
    group = group or SoloCommunicator()
    num_layers = config.shape.num_layers
    cuts = [num_layers * stage // pp for stage in range(pp + 1)]
    stages = []
    for stage in range(pp):
        shard = Shard(
            layers=range(cuts[stage], cuts[stage + 1]),
            tp_rank=group.rank,
            tp_size=group.size,
            ep_size=ep,
            is_first=stage == 0,
            is_last=stage == pp - 1,
            group=group,
        )
        stages.append(MODELS[config.architecture](config, shard, dtype=dtype))
        fill(stages[-1], folder)
    return stages


class Engine:
    """Stages with caches, and sequences in shuffled blocks."""

    def __init__(self, stages, prompts, *, max_len, seed=0):
        self.stages = stages
        self.tokens = [list(prompt) for prompt in prompts]
        self.computed = [0] * len(prompts)
        blocks_each = -(-max_len // BLOCK_SIZE)
        blocks = list(range(blocks_each * len(prompts) + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [blocks[i * blocks_each :][:blocks_each] for i in range(len(prompts))]
        self.caches = [
            allocate_caches(
                stage.config,
                stage.shard,
                num_blocks=len(blocks),
                block_size=BLOCK_SIZE,
                dtype=stage.dtype,
                device=stage.device,
            )
            for stage in stages
        ]

    def batch(self, rows):
        """The micro-batch of these (sequence, number of tokens), those with one token of output first."""
        positions = [self.computed[s] + i for s, count in rows for i in range(count)]
        owners = [s for s, count in rows for _ in range(count)]
        lengths = [self.computed[s] + count for s, count in rows]
        starts = [0]
        for _, count in rows:
            starts.append(starts[-1] + count)
        return AttentionBatch(
            positions_T=torch.tensor(positions),
            slot_mapping_T=torch.tensor(
                [
                    self.tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                    for s, p in zip(owners, positions, strict=True)
                ]
            ),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            kv_lens_S=torch.tensor(lengths, dtype=torch.int32),
            block_tables_SB=torch.tensor([self.tables[s] for s, _ in rows], dtype=torch.int32),
            num_decodes=sum(self.is_decoding(s) for s, _ in rows),
            max_query_len=max(count for _, count in rows),
            max_kv_len=max(lengths),
        )

    def is_decoding(self, sequence):
        return self.computed[sequence] == len(self.tokens[sequence]) - 1

    @torch.inference_mode()
    def step(self, rows):
        """Compute these rows; logits of every token."""
        rows = sorted(rows, key=lambda row: not self.is_decoding(row[0]))
        batch = self.batch(rows)
        ids = [t for s, count in rows for t in self.tokens[s][self.computed[s] :][:count]]
        x = self.stages[0].embed(torch.tensor(ids))
        for stage, caches in zip(self.stages, self.caches, strict=True):
            x = stage(x, batch, caches)
        for sequence, count in rows:
            self.computed[sequence] += count
        return self.stages[-1].logits(x).split([count for _, count in rows]), [s for s, _ in rows]

    def greedy(self, num_tokens, *, chunk):
        """Generate: chunks of prompts and decode steps mix, as prompts differ in length."""
        ends = [len(tokens) + num_tokens for tokens in self.tokens]
        while rows := [
            (s, min(chunk, len(tokens) - self.computed[s]))
            for s, tokens in enumerate(self.tokens)
            if len(tokens) < ends[s]
        ]:
            logits, sequences = self.step(rows)
            for each, sequence in zip(logits, sequences, strict=True):
                if self.computed[sequence] == len(self.tokens[sequence]):
                    self.tokens[sequence].append(int(each[-1].argmax()))
        return self.tokens


def random_prompts(lengths, vocab_size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
