"""Between stages: what was sent is not kept for ever, and what nobody feeds in is taken all the same."""

import os
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from runtime.inprocess import local_llm
from runtime.servers import free_port
from runtime.tiny_models import make

from gllm import SamplingParams
from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.worker.groups import connect
from gllm.runtime.worker.worker import Worker

MAX_IN_FLIGHT = 3
NUM_SENT = 40


def _rank(rank, port, found):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    _, neighbours = connect(Parallel(pp=2), load_shape("qwen3-0.6b"), rank, torch.device("cpu"), MAX_IN_FLIGHT)
    for number in range(NUM_SENT):
        if rank == 0:
            neighbours.after.send(torch.full((4,), float(number)))
        else:
            assert neighbours.before.receive(torch.zeros(4)).tolist() == [number] * 4
    found.put((rank, len(neighbours.after._sent) if rank == 0 else 0))
    dist.barrier()


def test_an_edge_keeps_no_more_than_may_be_on_the_road():
    context = get_context("spawn")
    found = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, found), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    kept = dict(found.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    assert kept[0] == MAX_IN_FLIGHT


def test_a_slot_holds_the_largest_steps_hidden_states(tmp_path, monkeypatch):
    given = []

    def end(*_, **options):
        given.append(options)
        raise InterruptedError

    make("qwen3", tmp_path)
    monkeypatch.setattr("gllm.runtime.worker.worker.connect", end)
    config = RuntimeConfig(model=str(tmp_path), device="cpu", policy="sarathi:token_budget=100")
    with pytest.raises(InterruptedError):
        Worker(config, 0, torch.device("cpu"), None, None, ahead=None)
    assert given == [{"largest_bytes": 100 * config.check().shape.hidden_size * 4}]


def test_tokens_that_no_step_feeds_in_do_not_pile_up(tmp_path):
    """Answers of one token, one after another: the first stage never needs what the last one sampled."""
    make("qwen3", tmp_path)
    with local_llm(tmp_path, pp=2) as llm:
        for number in range(12):
            llm.generate([[1 + number, 2, 3]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        first, last = llm._client.pipeline.stages
        most = llm._client.limits.max_in_flight
        assert len(first._awaited) <= most
        assert len(last._neighbours.tokens.sent) <= most
