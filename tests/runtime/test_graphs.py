"""Steps padded to the sizes of graphs, without a GPU: a graph here is what was captured, computed again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from gllm_kernels.routing import route
from runtime import inprocess
from runtime.inprocess import local_llm
from runtime.stepping import random_prompts
from runtime.tiny_models import VOCAB_SIZE, make

from gllm import SamplingParams
from gllm.graph_sizes import MAX_TOKENS, graph_sizes, token_graph_sizes
from gllm.model_shape import load_shape
from gllm.runtime.worker import graphs, stage

PROMPTS = random_prompts((1, 3, 41, 10, 70, 16, 17, 30, 2, 9), VOCAB_SIZE)
MOST_TOKENS = 50  # in a graph: longer steps are computed without one
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TOLD = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1, logprobs=1)


class Pool:
    """Captures by remembering."""

    def capture(self, work):
        work()
        return SimpleNamespace(replay=work)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Gives the folder of a model, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(name, made[name])
        return made[name]

    return get


@pytest.fixture
def captured(monkeypatch):
    """Stages replay; what is yielded lists the tokens of steps with chunks that did."""
    replayed = []

    class CapturedStage(stage.Stage):
        def __init__(self, *args, **options):
            super().__init__(*args, backend="triton", **options)
            self.capture(MOST_TOKENS)

    class CountedGraphs(graphs.TokenGraphs):
        def replay(self, packed, num_tokens, hidden):
            replayed.append(num_tokens)
            return super().replay(packed, num_tokens, hidden)

    monkeypatch.setattr(stage, "GraphPool", Pool)
    monkeypatch.setattr(stage, "TokenGraphs", CountedGraphs)
    monkeypatch.setattr(inprocess, "Stage", CapturedStage)
    return replayed


def answers(folder, params, **options):
    with local_llm(folder, max_num_seqs=6, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in PROMPTS], params, use_tqdm=False)
    return [(output.outputs[0].token_ids, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(
    "policy", ["sarathi:token_budget=64", "throttle:min_prefill=1,max_prefill=20", "prefill_first:token_budget=40"]
)
def test_padding_changes_no_answer(policy, pp, tiny, request):
    folder = tiny("qwen3")
    expected = answers(folder, GREEDY, policy=policy, pp=pp)
    replayed = request.getfixturevalue("captured")
    assert answers(folder, GREEDY, policy=policy, pp=pp) == expected
    assert replayed
    assert max(replayed) <= MOST_TOKENS
    assert set(replayed) - set(token_graph_sizes(MOST_TOKENS, load_shape(folder))), "nothing was padded"


def test_prompts_are_told_of_from_a_graph(tiny, request):
    folder = tiny("qwen3-moe")
    expected = answers(folder, TOLD, policy="sarathi:token_budget=48")
    replayed = request.getfixturevalue("captured")
    found = answers(folder, TOLD, policy="sarathi:token_budget=48")
    assert replayed
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, mine), (_, others) in zip(found, expected, strict=True):
        for place, other in zip(mine[1:], others[1:], strict=True):
            assert {token: pytest.approx(entry.logprob, abs=1e-4) for token, entry in place.items()} == {
                token: entry.logprob for token, entry in other.items()
            }


def test_padding_visits_no_expert(tiny, request, monkeypatch):
    """Neither in graphs of decodes nor in those of chunks: what is not there has nothing read for it."""
    visits = []

    def seen(*args, **options):
        weights, ids = route(*args, **options)
        visits.append((int((ids >= 0).sum()), ids.numel()))
        return weights, ids

    monkeypatch.setattr("gllm.runtime.layers.moe.route", seen)
    request.getfixturevalue("captured")
    answers(tiny("qwen3-moe"), GREEDY, policy="sarathi:token_budget=48")
    real, padded = map(sum, zip(*visits, strict=True))
    num_layers, num_chosen = 3, 2
    assert real == num_layers * num_chosen * sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in PROMPTS)
    assert padded > real


@pytest.mark.parametrize("most", [1, 7, 16, 100, 512, 600, 4096, 10_000])
def test_sizes_increase_to_the_largest_step(most):
    decodes = graph_sizes(most)
    assert decodes == sorted(set(decodes))
    assert decodes[-1] == min(most, 512)
    for name in ("qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b"):
        tokens = token_graph_sizes(most, load_shape(name))
        assert tokens == sorted(set(tokens))
        assert tokens[-1] <= most


def test_large_models_need_no_graphs_of_long_steps():
    """Their GPUs are busy for longer than a host needs to launch a step."""
    largest = [token_graph_sizes(16384, load_shape(f"qwen3-{size}"))[-1] for size in ("0.6b", "8b", "32b")]
    assert largest == [8192, 1088, 384]
    assert token_graph_sizes(16384, load_shape("qwen3-8b"), tp=2)[-1] == 2 * 1088


def test_the_simulator_charges_the_sizes_that_are_captured():
    from gllm.sim import roofline

    assert (roofline.graph_sizes, roofline.token_graph_sizes) == (stage.graph_sizes, stage.token_graph_sizes)
    for name in ("qwen3-0.6b", "qwen3-8b", "qwen3-32b"):  # its steps have no bound but this one
        assert token_graph_sizes(MAX_TOKENS, load_shape(name)) == token_graph_sizes(10**6, load_shape(name))
