"""The embedded model's score is the same however it is served: it is what a user would see of a mistake."""

import pytest

from gllm.runtime.default_model.tasks import held_out_cases
from gllm.runtime.llm import LLM
from gllm.runtime.sampling_params import SamplingParams

CASES = held_out_cases(32, 1)
GREEDY = SamplingParams(temperature=0, max_tokens=128)
WAYS = {
    "pipeline": {"pp": 2},
    "tensor": {"tp": 2},
    "both": {"pp": 2, "tp": 2},
    "small chunks": {"policy": "sarathi:token_budget=48"},
    "no prefix cache": {"prefix_caching": False},
    "preemption": {"block_size": 2, "num_blocks": 400, "policy": "sarathi"},
    "planned ahead": {"pp": 2, "max_in_flight": 3},
}


def answers(**options):
    with LLM(dtype="float32", **options) as llm:
        outputs = llm.chat([list(case.messages) for case in CASES], GREEDY, use_tqdm=False)
        return [output.outputs[0].text for output in outputs], llm.stats()


@pytest.fixture(scope="module")
def plain():
    return answers()[0]


def test_it_scores_well(plain):
    right = sum(text == case.answer for text, case in zip(plain, CASES, strict=True))
    assert right >= 0.95 * len(CASES)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_serving_gives_the_same_answers(way, plain):
    found, stats = answers(**WAYS[way])
    assert found == plain
    assert (stats.num_preemptions > 0) == (way == "preemption")
    assert (stats.prefix_hits > 0) == (way != "no prefix cache")
