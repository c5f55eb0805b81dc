"""Real processes over gloo: every layout answers what transformers answers, and leaves nothing behind."""

from __future__ import annotations

import pytest
from runtime.inprocess import local_llm
from runtime.processes import engine
from runtime.reference import assert_greedy, greedy, token_ids
from runtime.stepping import random_prompts
from runtime.tiny_models import VOCAB_SIZE, make
from runtime.traffic import assert_undisturbed, come_and_go

from gllm import SamplingParams

NUM_TOKENS = 64
PROMPTS = random_prompts((1, 3, 41, 10, 70, 16, 17, 33), VOCAB_SIZE)
MIXED = [
    SamplingParams(
        temperature=0.5 + 0.2 * number,
        seed=number,
        max_tokens=24 + number,
        ignore_eos=True,
        top_p=0.95 if number % 2 else 1.0,
        presence_penalty=0.3 if number % 3 else 0.0,
        logprobs=number % 3 or None,
        prompt_logprobs=2 if number == 4 else None,
    )
    for number in range(len(PROMPTS))
]

# Dense, sparse and GLM's models each meet tensor and pipeline parallelism. Pipelines of three layers over two stages
# are uneven by themselves.
ARCHITECTURES = {
    "llama": {"pp": 3, "max_in_flight": 4},
    "mistral": {"tp": 2, "pp": 2, "pp_layers": (1, 2)},
    "qwen2": {"tp": 2, "pp": 2, "policy": "sarathi:token_budget=7"},
    "qwen2-moe": {"tp": 2, "ep": 2, "pp": 2},
    "qwen3-moe": {"tp": 2, "ep": 2, "num_blocks": 60},
    "mixtral": {"tp": 2, "pp": 2, "policy": "prefill_first"},
    "glm": {"tp": 2, "prefix_caching": False},
    "glm4": {"pp": 3, "policy": "orca"},
    "chatglm": {"tp": 2, "pp": 2, "max_in_flight": 3},
}
LAYOUTS = [
    {"tp": 2, "max_in_flight": 2},
    {"pp": 2, "num_blocks": 60, "policy": "sarathi:token_budget=7"},
    {"pp": 3, "max_in_flight": 4, "num_blocks": 60},
    {"tp": 2, "pp": 2},
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_over_processes_is_transformers(name, tmp_path):
    model = make(name, tmp_path)
    with engine(tmp_path, **ARCHITECTURES[name]) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False))
        assert bool(llm._generations.stats.num_preemptions) == ("num_blocks" in ARCHITECTURES[name])
    assert_greedy(model, PROMPTS, answers, NUM_TOKENS)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Folder, transformers' model, and what the requests of MIXED give where no process is involved."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = make("qwen3", folder)
    with local_llm(folder) as llm:
        return folder, model, llm.generate(PROMPTS, MIXED, use_tqdm=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_change_neither_greedy_nor_drawn_tokens_whoever_leaves(qwen3, layout):
    folder, model, drawn = qwen3
    with engine(folder, **layout) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False))
        assert_greedy(model, PROMPTS, answers, NUM_TOKENS)
        assert bool(llm._generations.stats.num_preemptions) == ("num_blocks" in layout)
        outputs = llm.generate(PROMPTS, MIXED, use_tqdm=False)
        assert token_ids(outputs) == token_ids(drawn)
        for ours, theirs in zip(outputs, drawn, strict=True):
            assert_same_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)
            assert_same_logprobs(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
        params, leaving = [greedy(NUM_TOKENS)] * len(PROMPTS), (0, 3, 4)
        assert_undisturbed(come_and_go(llm, PROMPTS, params, leaving=leaving), answers, leaving=leaving)


def assert_same_logprobs(ours, theirs):
    assert (ours is None) == (theirs is None)
    for our_place, their_place in zip(ours or (), theirs or (), strict=True):
        assert (our_place is None) == (their_place is None)
        if our_place is not None:
            assert list(our_place) == list(their_place)
            numbers = [[entry.logprob for entry in place.values()] for place in (our_place, their_place)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
            assert [entry.rank for entry in our_place.values()] == [entry.rank for entry in their_place.values()]
