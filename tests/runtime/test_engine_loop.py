"""The engine's loop over true stages in one process: however requests are batched, the tokens are the same."""

from __future__ import annotations

import itertools

import pytest
from runtime.inprocess import local_llm
from runtime.reference import assert_greedy, greedy, token_ids
from runtime.stepping import random_prompts
from runtime.tiny_models import NAMES, SIZES, TINY, VOCAB_SIZE, make, randomise
from runtime.traffic import assert_undisturbed, come_and_go

from gllm import SamplingParams

NUM_TOKENS = 32
SHARED = random_prompts([30], VOCAB_SIZE, seed=5)[0]
PROMPTS = [
    SHARED,
    *random_prompts((1, 3, 41, 10, 70, 16, 17), VOCAB_SIZE),
    *(
        SHARED[:length] + rest
        for length, rest in zip((30, 30, 21), random_prompts((9, 1, 30), VOCAB_SIZE), strict=True)
    ),
    SHARED,
]
FEW_BLOCKS = 40  # of 4 tokens; the longest sequence needs 26
MIXED = [
    SamplingParams(
        temperature=0.7 + 0.1 * number,
        seed=number,
        max_tokens=NUM_TOKENS - number,
        ignore_eos=True,
        top_p=1.0 if number % 2 else 0.9,
        top_k=0 if number % 3 else 20,
        repetition_penalty=1.0 if number % 4 else 1.3,
        frequency_penalty=0.5 if number % 5 == 1 else 0.0,
        min_tokens=number,
    )
    for number in range(len(PROMPTS))
]
"""One for each prompt, all different."""

POLICIES = (
    "throttle",
    "throttle:min_prefill=1,max_prefill=7",
    "throttle:wt=false,split_decode=false",
    "sarathi:token_budget=64",
    "sarathi:token_budget=7",
    "prefill_first",
    "prefill_first:token_budget=32",
    "orca",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a Qwen3 of five layers."""
    return five_layers(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What transformers answers, greedy."""
    folder, model = five_layers(tmp_path_factory)
    with local_llm(folder) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False))
    assert_greedy(model, PROMPTS, answers, NUM_TOKENS)
    return answers


@pytest.fixture(scope="module")
def drawn(folder):
    """What each request draws when it is alone."""
    with local_llm(folder) as llm:
        return [
            token_ids(llm.generate([prompt], params, use_tqdm=False))[0]
            for prompt, params in zip(PROMPTS, MIXED, strict=True)
        ]


_MADE = {}


def five_layers(tmp_path_factory):
    if not _MADE:
        configuration, kind, keys = TINY["qwen3"]
        model = kind(configuration(**{**SIZES, **keys, "num_hidden_layers": 5})).eval()
        randomise(model)
        folder = tmp_path_factory.mktemp("qwen3")
        model.save_pretrained(folder)
        _MADE[folder] = model
    return next(iter(_MADE.items()))


def chunk_sizes(llm):
    """The most tokens of any micro-batch."""
    return max(llm._client.pipeline.num_tokens)


# Each policy with one, two and three stages; all of them together in every combination with caching and planning ahead.
LAYOUTS = list(itertools.product([1, 2, 3], [True, False], [0, 1]))
MATRIX = [
    (policy, *LAYOUTS[(4 * number + policy_number) % len(LAYOUTS)])
    for policy_number, policy in enumerate(POLICIES)
    for number in range(3)
]


def test_the_matrix_is_whole():
    assert {tuple(layout) for _, *layout in MATRIX} == set(LAYOUTS)


@pytest.mark.parametrize("layout", MATRIX, ids=str)
def test_tokens_depend_neither_on_policy_nor_on_stages_caching_or_planning_ahead(folder, expected, layout):
    policy, pp, caching, ahead = layout
    options = {"policy": policy, "pp": pp, "prefix_caching": caching, "max_in_flight": pp + ahead, "max_num_seqs": 6}
    with local_llm(folder, **options) as llm:
        assert token_ids(llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)) == expected
        assert bool(llm._client.stats.prefix_hits) == caching
        assert llm._client.stats.num_preemptions == 0


@pytest.mark.parametrize(("chunk", "pp"), [(1, 1), (1, 3), (7, 2), (64, 3)])
def test_tokens_do_not_depend_on_the_chunk_size(folder, expected, chunk, pp):
    params = greedy(12)  # at one token a step, that is many steps
    with local_llm(folder, policy=f"sarathi:token_budget={chunk}", pp=pp, max_in_flight=pp + 1) as llm:
        answers = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
        assert answers == [answer[:12] for answer in expected]
        assert chunk_sizes(llm) == chunk


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    "layout",
    [("throttle", 1), ("throttle", 3), ("sarathi:token_budget=16", 2), ("prefill_first", 1), ("prefill_first", 3)],
)
def test_preemption_changes_no_token(folder, expected, drawn, layout, ahead):
    policy, pp = layout
    options = {"policy": policy, "pp": pp, "max_in_flight": pp + ahead, "num_blocks": FEW_BLOCKS, "seed": ahead}
    with local_llm(folder, **options) as llm:
        assert token_ids(llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)) == expected
        num_greedy = llm._client.stats.num_preemptions
        assert num_greedy > 0
        assert token_ids(llm.generate(PROMPTS, MIXED, use_tqdm=False)) == drawn
        assert llm._client.stats.num_preemptions > num_greedy


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pp": 3, "max_in_flight": 5},
        {"policy": "sarathi:token_budget=7", "pp": 2, "prefix_caching": False},
        {"policy": "orca", "max_num_seqs": 3, "pp": 2, "max_in_flight": 3},
        {"policy": "prefill_first", "max_num_seqs": 1},
        {"block_size": 16, "pp": 2},
        {"block_size": 1, "num_blocks": 600},
    ],
    ids=str,
)
def test_a_seeds_tokens_do_not_depend_on_who_else_is_there(folder, drawn, options):
    with local_llm(folder, **options) as llm:
        assert token_ids(llm.generate(PROMPTS, MIXED, use_tqdm=False)) == drawn


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {"max_in_flight": 2},
        {"pp": 3, "max_in_flight": 4, "num_blocks": FEW_BLOCKS},
        {"pp": 2, "policy": "sarathi:token_budget=7", "num_blocks": FEW_BLOCKS, "max_num_seqs": 5},
        {"pp": 2, "policy": "prefill_first", "max_in_flight": 4, "max_num_seqs": 3},
        {"pp": 3, "policy": "orca"},
    ],
    ids=str,
)
def test_who_leaves_disturbs_nobody(folder, drawn, options, seed):
    leaving = range(seed % 2, len(PROMPTS), 2)
    with local_llm(folder, seed=seed, **options) as llm:
        answers = come_and_go(llm, PROMPTS, MIXED, leaving=leaving, seed=seed)
        assert_undisturbed(answers, drawn, leaving=leaving)
        again = come_and_go(llm, PROMPTS, MIXED, seed=seed + 1)  # in the blocks that they left
        assert_undisturbed(again, drawn)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_over_stages_is_transformers(name, tmp_path):
    model = make(name, tmp_path)
    pp = 2 + NAMES.index(name) % 2
    with local_llm(tmp_path, pp=pp, policy="throttle:min_prefill=8", max_in_flight=pp + 1) as llm:
        answers = token_ids(llm.generate(PROMPTS[:8], greedy(64), use_tqdm=False))
    assert_greedy(model, PROMPTS[:8], answers, 64)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("ahead", [0, 1])
def test_stops_found_late_end_the_answer_where_they_stand(folder, expected, pp, ahead):
    stops = [answer[5 + number] for number, answer in enumerate(expected)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=[stop]) for stop in stops
    ]
    with local_llm(folder, pp=pp, max_in_flight=pp + ahead) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for output, whole, stop in zip(outputs, expected, stops, strict=True):
            answer = output.outputs[0]
            assert answer.token_ids == whole[: whole.index(stop) + 1]
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_the_numbers_tell_of_an_abort(folder):
    with local_llm(folder) as llm:
        generations = llm._generations
        requests = generations.prepare(PROMPTS[4], greedy(100), lambda _: None)
        generations.submit(requests)
        for _ in range(5):
            llm._listen()
        assert generations.stats.num_running == 1
        assert generations.stats.kv_usage > 0
        generations.abort(requests)
        llm._client.drain()
        while llm._client.notices:
            llm._listen()
        assert generations.stats.num_running == 0
        assert generations.stats.kv_usage == 0
