"""An engine within this process: the true loop, stages, sampler and front end; only sockets and processes are left out.

Every message is encoded and decoded on its way. Which of the stages, or the engine, goes on next is drawn by lot, so
that plans, activations, tokens and results meet in every order that a real pipeline allows.
"""

from __future__ import annotations

import random
import time
from collections import deque
from contextlib import contextmanager
from functools import lru_cache
from unittest.mock import patch

import torch

from gllm.policy import parse_policy
from gllm.runtime import llm as llm_module
from gllm.runtime.engine.loop import EngineLoop
from gllm.runtime.messages import (
    Abort,
    Ready,
    StepDone,
    Submit,
    decode_command,
    decode_notice,
    decode_order,
    decode_report,
    encode,
)
from gllm.runtime.model_config import load_model_config
from gllm.runtime.models import MODELS
from gllm.runtime.shard import Shard
from gllm.runtime.weights import load_weights
from gllm.runtime.worker.groups import Neighbours
from gllm.runtime.worker.stage import Stage

torch.set_num_threads(1)

NUM_BLOCKS = 400


class Pipe:
    """An edge of the pipeline in memory."""

    def __init__(self):
        self.sent = deque()

    def send(self, tensor):
        self.sent.append(tensor.clone())

    def receive(self, tensor):
        arrived = self.sent.popleft()
        assert (arrived.shape, arrived.dtype) == (tensor.shape, tensor.dtype)
        return tensor.copy_(arrived)


@lru_cache(maxsize=8)
def load_models(folder, parallel):
    """The models of all stages of one rank each, in float32."""
    config = load_model_config(folder)
    models = []
    for stage in range(parallel.pp):
        layers = parallel.layers_of_stage(config.shape, stage)
        shard = Shard(layers=layers, is_first=stage == 0, is_last=stage == parallel.pp - 1)
        models.append(MODELS[config.architecture](config, shard, dtype=torch.float32).eval())
        load_weights(models[-1], folder)
    return models


class Pipeline:
    """All workers: every stage has its queue of steps and computes when its inputs are there and its lot is drawn."""

    def __init__(self, config, limits, report):
        models, pp = load_models(config.model, config.parallel), config.parallel.pp
        pipes = [Pipe() for _ in range(pp - 1)]
        tokens = Pipe() if pp > 1 else None
        before, after = [None, *pipes], [*pipes, None]
        self.before = before
        self.steps = [deque() for _ in range(pp)]
        self.num_done = 0  # of the last stage: plans are numbered from 0
        self.num_tokens = []  # of every step
        self.stages = [
            Stage(
                model,
                Neighbours(before[stage], after[stage], tokens if stage in (0, pp - 1) else None),
                stage=stage,
                report=lambda make: report(make()),
                limits=limits,
            )
            for stage, model in enumerate(models)
        ]

    def dispatch(self, step):
        message = encode(step)
        self.num_tokens.append(step.num_decodes + sum(chunk.num_tokens for chunk in step.chunks))
        for queue in self.steps:
            queue.append(decode_order(message))

    def ready(self):
        """Stages that could compute their next step now."""
        return [stage for stage, queue in enumerate(self.steps) if queue and self._has_inputs(stage, queue[0])]

    def _has_inputs(self, stage, step):
        return step.depends_on < self.num_done if stage == 0 else bool(self.before[stage].sent)

    def run(self, stage):
        self.stages[stage].run(self.steps[stage].popleft())
        self.num_done += stage == len(self.stages) - 1


class LocalClient:
    """What `EngineClient` is, with its engine inside. Checks the core's state after every turn."""

    def __init__(self, config):
        self.config, self.model = config, config.check()
        self.failure = None
        self.lots = random.Random(config.seed)
        limits = config.limits(config.num_blocks or NUM_BLOCKS)
        self.limits = limits
        self.reports, self.notices = deque(), deque()
        self.pipeline = Pipeline(config, limits, lambda report: self.reports.append(encode(report)))
        self.loop = EngineLoop(
            parse_policy(config.policy),
            limits,
            self.model.eos_token_ids,
            self.pipeline,
            self._tell,
        )
        self.ended = set()  # keys
        self.ready = Ready(limits.num_blocks, limits.max_tokens_per_sequence, "cpu")

    def _tell(self, notice):
        for delta in getattr(notice, "deltas", ()):
            assert delta.key not in self.ended, "news after the end"
            if delta.finish_reason is not None:
                self.ended.add(delta.key)
        self.notices.append(encode(notice))

    def wait_until_ready(self):
        return self.ready

    def submit(self, requests):
        self._command(Submit(requests))

    def abort(self, keys):
        self._command(Abort(list(keys)))

    def _command(self, command):
        self.loop.command(decode_command(encode(command)))

    def receive(self, timeout_s):
        """The next notice; works until there is one."""
        while not self.notices:
            self._turn()
            if not self.notices and not self._step():
                assert self.loop.timeout_ms() is not None, f"waits for {timeout_s} s, and nothing will happen"
                time.sleep(self.loop.timeout_ms() / 1000)
        return decode_notice(self.notices.popleft())

    def _turn(self):
        self.loop.run()
        self.loop.engine.check_invariants()

    def _step(self):
        """Let someone go on; False if nobody can."""
        choices = self.pipeline.ready() + [None] * bool(self.reports)
        if not choices:
            return False
        choice = self.lots.choice(choices)
        if choice is not None:
            self.pipeline.run(choice)
            return True
        report = decode_report(self.reports.popleft())
        if isinstance(report, StepDone):
            self.loop.done(report)
        return True

    @property
    def stats(self):
        return self.loop.stats()

    def drain(self):
        """Finish what is on the road; then nothing may be held."""
        self._turn()
        while self._step():
            self._turn()
        assert self.loop.is_idle
        assert self.loop.engine.view.num_free_blocks == self.limits.num_blocks
        sequences = self.loop._sequences
        assert sorted(sequences._free_slots) == list(range(self.limits.max_num_seqs))
        assert not sequences.by_id
        assert not sequences.id_of

    def close(self):
        """Nothing to end."""


@contextmanager
def local_llm(folder, **options):
    """`LLM`, with its engine in this process; after it, the engine must hold nothing."""
    options = {"block_size": 4, "max_num_seqs": 16} | options
    with patch.object(llm_module, "EngineClient", LocalClient):
        llm = llm_module.LLM(str(folder), **options)
    with llm:
        yield llm
        assert not llm._generations._streams
        llm._client.drain()
