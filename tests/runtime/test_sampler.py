"""The sampler: the right distribution, each option by hand, and a row's token never depends on the batch."""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

from __future__ import annotations

import math
import random

import pytest
import torch
from gllm_kernels import sampling

from gllm.runtime.messages import Admission
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.worker.sampler import Sampler

torch.set_num_threads(1)

INF = math.inf


def admission(slot, params, seed, prompt, output, stop):  # noqa: PLR0917 - a request
    return Admission(slot, [*prompt, *output], len(prompt), params, seed, list(stop))


def sampler_with(vocab_size, *requests):
    """A sampler whose slots 0, 1, ... hold these (params, seed, prompt, output, stop tokens)."""
    sampler = Sampler(max(1, len(requests)), vocab_size, "cpu")
    sampler.add_all([admission(slot, *request) for slot, request in enumerate(requests)])
    return sampler


def step(sampler, logits_SV, slots):
    return sampler(logits_SV, slots, torch.tensor(slots))


def tokens_of(sampler, logits_SV, slots):
    return step(sampler, logits_SV, slots).tokens_S.tolist()


def draws(logits_V, params, num):
    """Tokens that `num` different seeds draw from the same logits."""
    sampler = sampler_with(len(logits_V), *((params, seed, [], [], []) for seed in range(num)))
    return step(sampler, logits_V.expand(num, -1).contiguous(), list(range(num))).tokens_S


def chi_square(tokens, probs_V):
    expected_V = probs_V.double() * len(tokens)
    counts_V = torch.bincount(tokens, minlength=len(probs_V))
    assert not counts_V[expected_V == 0].any()
    held_V = expected_V > 0
    return ((counts_V - expected_V)[held_V] ** 2 / expected_V[held_V]).sum().item(), int(held_V.sum()) - 1


def assert_drawn_from(tokens, probs_V):
    statistic, freedom = chi_square(tokens, probs_V)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4  # the seeds are fixed: this holds for good


# The distribution.

LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_follow_the_softmax(temperature):
    tokens = draws(LOGITS_V, SamplingParams(temperature=temperature), 20_000)
    assert_drawn_from(tokens, (LOGITS_V / temperature).softmax(0))


def test_one_seeds_steps_follow_the_softmax_and_are_not_alike():
    sampler = sampler_with(8, (SamplingParams(), 7, [], [], []))
    tokens = torch.tensor([tokens_of(sampler, LOGITS_V[None], [0])[0] for _ in range(4000)])
    assert_drawn_from(tokens, LOGITS_V.softmax(0))
    pairs = tokens[:-1] * 8 + tokens[1:]
    assert_drawn_from(pairs, torch.outer(LOGITS_V.softmax(0), LOGITS_V.softmax(0)).flatten())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, [0, 6, 1]),
        ({"top_p": 0.6}, [0, 6]),
        ({"min_p": 0.3}, [0, 6, 1]),
        ({"top_k": 4, "top_p": 0.8}, [0, 6, 1]),
        ({"min_p": 0.2, "top_p": 0.99, "top_k": 100}, [0, 6, 1, 2]),
    ],
)
def test_a_filter_leaves_the_rest_in_proportion(options, kept):
    probs_V = torch.zeros(8)
    probs_V[kept] = LOGITS_V[kept].softmax(0)
    assert_drawn_from(draws(LOGITS_V, SamplingParams(**options), 5000), probs_V)


def test_the_filters_see_the_probabilities_after_the_temperature():
    logits_V = torch.tensor([2.0, 0.0])  # 0.88 and 0.12; at temperature 4, 0.62 and 0.38
    assert draws(logits_V, SamplingParams(top_p=0.8), 200).unique().tolist() == [0]
    assert draws(logits_V, SamplingParams(top_p=0.8, temperature=4), 200).unique().tolist() == [0, 1]
    assert draws(logits_V, SamplingParams(min_p=0.5), 200).unique().tolist() == [0]
    assert draws(logits_V, SamplingParams(min_p=0.5, temperature=4), 200).unique().tolist() == [0, 1]


def test_extreme_temperatures_hold():
    logits_V = torch.tensor([0.0, 0.1, 30.0, -INF])
    assert draws(logits_V, SamplingParams(temperature=1e-4), 50).unique().tolist() == [2]
    assert draws(logits_V, SamplingParams(temperature=1e300), 200).unique().tolist() == [0, 1, 2]


# Bias, masks and penalties.


def test_a_bias_moves_the_choice():
    logits_SV = torch.tensor([[0.0, 5.0, 1.0]] * 2)
    biased = SamplingParams(temperature=0, logit_bias={2: 4.5, 1: -1})
    sampler = sampler_with(3, (biased, 0, [], [], []), (SamplingParams(temperature=0), 0, [], [], []))
    assert tokens_of(sampler, logits_SV, [0, 1]) == [2, 1]
    assert logits_SV.tolist() == [[0.0, 5.0, 1.0]] * 2  # the caller's logits stay


def test_stop_tokens_are_shut_out_until_min_tokens():
    logits_SV = torch.tensor([[9.0, 8.0, 1.0]])
    params = SamplingParams(temperature=0, min_tokens=2, logit_bias={0: 50})
    sampler = sampler_with(3, (params, 0, [], [], {0, 1}))
    assert [tokens_of(sampler, logits_SV, [0])[0] for _ in range(4)] == [2, 2, 0, 0]
    sampler.add_all([admission(0, params, 0, [], [2], {0, 1})])  # back from a preemption, one token old
    assert [tokens_of(sampler, logits_SV, [0])[0] for _ in range(2)] == [2, 0]


def test_penalties_by_hand():
    logits_SV = torch.tensor([[4.0, -4.0, 3.0, 2.0, -1.0]])
    penalised_SV = sampling.penalize(
        logits_SV,
        torch.tensor([[0, 1, 3, 0, 2]], dtype=torch.int32),
        torch.tensor([[True, False, True, False, False]]),
        repetition_S=torch.tensor([2.0]),
        frequency_S=torch.tensor([0.5]),
        presence_S=torch.tensor([0.25]),
    )
    # prompt: 4/2; output once: -4*2 - 0.5 - 0.25; both: 3/2 - 1.5 - 0.25; unseen; output twice: -1*2 - 1 - 0.25
    assert penalised_SV.tolist() == [[2.0, -8.75, -0.25, 2.0, -3.25]]


@pytest.mark.parametrize(
    ("options", "prompt", "expected"),
    [
        ({"presence_penalty": 1.0}, [0], [0, 1, 2, 0]),  # the prompt costs nothing; each output, once
        ({"frequency_penalty": 1.0}, [0], [0, 1, 2, 0]),
        ({"frequency_penalty": 0.25}, [], [0, 1, 0, 1]),
        ({"repetition_penalty": 1.5}, [0], [1, 2, 0, 0]),
        ({}, [0], [0, 0, 0, 0]),
    ],
)
def test_penalties_follow_the_output(options, prompt, expected):
    logits_SV = torch.tensor([[5.0, 4.8, 4.5]])
    sampler = sampler_with(3, (SamplingParams(temperature=0, **options), 0, prompt, [], []))
    assert [tokens_of(sampler, logits_SV, [0])[0] for _ in range(4)] == expected


def test_only_slots_with_penalties_have_a_history():
    plain, penal = SamplingParams(), SamplingParams(presence_penalty=1.0)
    sampler = sampler_with(50, *((penal if slot % 4 == 0 else plain, slot, [1], [2, 2], []) for slot in range(16)))
    assert len(sampler._histories._counts_CV) == 4
    sampler.add_all([admission(slot, plain, 0, [], [], []) for slot in range(16)])
    sampler.add_all([admission(3, penal, 0, [7], [9, 9], [])])
    assert len(sampler._histories._counts_CV) == 4  # room is used again, and it is clean
    counts_CV, in_prompt_CV = sampler._histories.read(sampler._histories.rows([3]))
    assert counts_CV.nonzero().tolist() == [[0, 9]]
    assert counts_CV[0, 9] == 2
    assert in_prompt_CV.nonzero().tolist() == [[0, 7]]


# Whatever else is in the batch.

VOCAB_SIZE = 61


def some_params(rng):
    """Any mixture of options."""

    def maybe(value, off):
        return value if rng.random() < 0.35 else off

    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=maybe(rng.randint(1, 70), 0),
        top_p=maybe(rng.uniform(0.05, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.5), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.5), 1.0),
        presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        logit_bias=maybe({rng.randrange(VOCAB_SIZE): rng.uniform(-5, 5) for _ in range(3)}, None),
        min_tokens=maybe(rng.randint(1, 8), 0),
        logprobs=maybe(rng.randint(0, 5), None),
    )


def some_request(rng):
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
    return (some_params(rng), rng.randrange(2**64), prompt, [], [0, 1])


def logits_after(request, output):
    """A model: its logits follow from the seed and the output so far."""
    generator = torch.Generator().manual_seed(hash((request[1], *output)) % 2**63)
    return torch.randn(VOCAB_SIZE, generator=generator) * 2


def answer_alone(request, num):
    """What a request gets in a batch of its own: tokens, and log-probabilities."""
    sampler, output, logprobs = sampler_with(VOCAB_SIZE, request), [], []
    for _ in range(num):
        sampled = step(sampler, logits_after(request, output)[None], [0])
        logprobs.append(sampled.logprobs[0] if sampled.logprobs else None)
        output += sampled.tokens_S.tolist()
    return output, logprobs


@pytest.mark.parametrize("trial", range(4))
def test_a_request_gets_the_same_answer_in_any_company(trial):
    rng = random.Random(trial)
    requests = [some_request(rng) for _ in range(12)]
    alone = [answer_alone(request, 8) for request in requests]
    sampler, slots = Sampler(12, VOCAB_SIZE, "cpu"), rng.sample(range(12), 12)
    answers = [([], []) for _ in requests]
    sampler.add_all([admission(slots[number], *request) for number, request in enumerate(requests)])
    while unfinished := [number for number, (output, _) in enumerate(answers) if len(output) < 8]:
        batch = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        if rng.random() < 0.3:  # preempted: it comes back, to another slot's place or its own
            number = rng.choice(batch)
            back = (*requests[number][:3], list(answers[number][0]), requests[number][4])
            sampler.add_all([admission(slots[number], *back)])
        logits_SV = torch.stack([logits_after(requests[number], answers[number][0]) for number in batch])
        sampled = step(sampler, logits_SV, [slots[number] for number in batch])
        listed = sampled.logprobs or [None] * len(batch)
        for number, token, logprobs in zip(batch, sampled.tokens_S.tolist(), listed, strict=True):
            answers[number][0].append(token)
            answers[number][1].append(logprobs)
    assert answers == alone


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    params = SamplingParams(temperature=1.2)
    answers = [answer_alone((params, seed, [1], [], []), 30)[0] for seed in (5, 5, 6)]
    sampler = sampler_with(VOCAB_SIZE, *((params, seed, [], [], []) for seed in (5, 5, 6, 2**64 - 1, 5 + 2**32)))
    logits_SV = torch.zeros(5, VOCAB_SIZE)
    rows = list(zip(*(tokens_of(sampler, logits_SV, [0, 1, 2, 3, 4]) for _ in range(30)), strict=True))
    assert answers[0] == answers[1]
    assert rows[0] == rows[1]
    assert len(set(rows)) == 4


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=7)],
)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_preempted_answer_goes_on_as_if_nothing_had_been(cut, params):
    request = (params, 99, [3, 4, 4], [], [0, 1])
    whole, _ = answer_alone(request, 10)
    sampler, output = Sampler(3, VOCAB_SIZE, "cpu"), whole[:cut]
    sampler.add_all([admission(2, params, 99, [3, 4, 4], output, [0, 1])])
    while len(output) < 10:
        output = output + tokens_of(sampler, logits_after(request, output)[None], [2])
    assert output == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_penalty_costs_the_other_rows_nothing(dtype):
    """A row with penalties leaves its neighbours' logits, filters and steps as they are."""
    logits_SV = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain, penal = SamplingParams(), SamplingParams(frequency_penalty=0.3, logit_bias={4: 0.01})
    filtered = SamplingParams(top_k=5, top_p=0.8)
    requests = [(params, 40 + slot, [1], [2, 2], []) for slot, params in enumerate((plain, penal, filtered))]
    together = sampler_with(VOCAB_SIZE, *requests)
    rows = [tokens_of(together, logits_SV, [0, 1, 2]) for _ in range(20)]
    for row, request in enumerate(requests):
        alone = sampler_with(VOCAB_SIZE, request)
        assert [tokens_of(alone, logits_SV[row : row + 1], [0])[0] for _ in range(20)] == [each[row] for each in rows]


# Plain batches.


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"temperature": 0}, True),
        ({"temperature": 1.7, "seed": 5, "max_tokens": 3, "prompt_logprobs": 2}, True),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5}, True),  # a greedy choice never meets them
        ({"top_k": 5}, False),
        ({"top_p": 0.5}, False),
        ({"min_p": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": {3: 1}}, False),
        ({"min_tokens": 2}, False),
        ({"logprobs": 0}, False),
    ],
)
def test_who_is_plain(options, plain):
    sampler = sampler_with(8, (SamplingParams(), 0, [], [], []), (SamplingParams(**options), 0, [], [], []))
    assert sampler.is_plain([1, 0]) is plain
    assert sampler.is_plain([0])
    sampler.add_all([admission(1, SamplingParams(), 0, [], [], [])])  # the next one in its slot
    assert sampler.is_plain([0, 1])


def test_a_slot_may_go_from_plain_batches_to_mixed_ones_and_back():
    rng = random.Random(9)
    plain = [(SamplingParams(temperature=t), rng.randrange(2**64), [1], [2] * t, []) for t in (0, 1, 2)]
    special = (SamplingParams(top_k=10, presence_penalty=0.5, logprobs=1), 3, [1], [], [])
    alone = [answer_alone(request, 12)[0] for request in plain]
    sampler = sampler_with(VOCAB_SIZE, *plain, special)
    outputs = [[], [], [], []]
    for turn in range(12):
        slots = [2, 0, 1] if turn % 3 else [3, 1, 2, 0]
        requests = [*plain, special]
        logits_SV = torch.stack([logits_after(requests[slot], outputs[slot]) for slot in slots])
        if sampler.is_plain(slots):
            tokens = sampler.choose_plain(logits_SV, torch.tensor(slots)).tolist()
        else:
            tokens = tokens_of(sampler, logits_SV, slots)
        for slot, token in zip(slots, tokens, strict=True):
            outputs[slot].append(token)
    assert outputs[:3] == alone


def test_padding_rows_change_nothing():
    params = SamplingParams()
    sampler, twin = (sampler_with(8, *((params, seed, [], [], []) for seed in (1, 2))) for _ in range(2))
    logits_SV = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    for _ in range(10):
        padded = sampler.choose_plain(logits_SV, torch.tensor([0, 1, 2, 2, 2])).tolist()
        assert padded[:2] == twin.choose_plain(logits_SV[:2], torch.tensor([0, 1])).tolist()
        assert padded[2:] == logits_SV[2:].argmax(dim=1).tolist()
    assert sampler._steps_N.tolist() == [10, 10, 0]


def test_requests_come_in_one_go_with_all_they_asked_for():
    params = SamplingParams(
        temperature=0.3, top_p=0.6, min_p=0.2, top_k=2**62, repetition_penalty=1e300, frequency_penalty=-1.5
    )
    greedy = SamplingParams(temperature=1e-7, presence_penalty=0.25)
    sampler = Sampler(5, 8, "cpu")
    sampler.add_all([admission(4, params, 2**64 - 3, [1, 2], [3], []), admission(1, greedy, 6, [1], [], [])])
    sampler.add_all([])
    assert sampler._ints_3N.T.tolist() == [[0] * 3, [6, 0, 0], [0] * 3, [0] * 3, [-3, 1, 2**62], [0] * 3]
    assert sampler._floats_6N.T.tolist()[1] == [0, 1, 0, 1, 0, 0.25]
    assert sampler._floats_6N.T.tolist()[4] == pytest.approx([0.3, 0.6, 0.2, INF, -1.5, 0])
    assert sampler._floats_6N.T.tolist()[5] == [0] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nobody_waits_and_the_answers_are_those_of_a_cpu():
    rng, devices = random.Random(5), ("cpu", "cuda")
    requests = [some_request(rng) for _ in range(40)]
    samplers = [Sampler(40, VOCAB_SIZE, device) for device in devices]
    logits_SV = torch.randn(40, VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) * 3
    given = [logits_SV.to(device) for device in devices]
    slots_S = [torch.arange(40, device=device) for device in devices]
    for sampler in samplers:  # compiles the kernels
        sampler.add_all([admission(slot, *request) for slot, request in enumerate(requests)])
        sampler(given[samplers.index(sampler)], list(range(40)), slots_S[samplers.index(sampler)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        samplers[1].add_all([admission(slot, *request) for slot, request in enumerate(requests)])
        on_gpu = samplers[1](given[1], list(range(40)), slots_S[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    samplers[0].add_all([admission(slot, *request) for slot, request in enumerate(requests)])
    on_cpu = samplers[0](given[0], list(range(40)), slots_S[0])
    assert on_gpu.tokens_S.tolist() == on_cpu.tokens_S.tolist()  # no two scores of these seeds are near each other
    for ours, theirs in zip(on_gpu.logprobs, on_cpu.logprobs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], abs=1e-4)


# Log-probabilities.


def test_logprobs_are_those_of_the_raw_logits():
    logits_SV = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    hot = SamplingParams(temperature=3, logprobs=5, logit_bias={1: 3}, presence_penalty=1, top_k=30)
    silent, own = SamplingParams(), SamplingParams(logprobs=0)
    sampler = sampler_with(40, *((params, 3, [2], [1], []) for params in (hot, silent, own)))
    sampled = step(sampler, logits_SV, [0, 1, 2])
    expected_SV = logits_SV.log_softmax(-1)
    order = logits_SV[0].argsort(descending=True).tolist()
    first, second, third = sampled.logprobs
    assert second is None
    assert [len(first), len(third)] == [6, 1]
    assert [each.token_id for each in first[1:]] == order[:5]
    assert [each.rank for each in first[1:]] == [1, 2, 3, 4, 5]
    for row, token in ((0, first[0]), (2, third[0])):
        assert token.token_id == sampled.tokens_S[row]
        assert token.rank == logits_SV[row].argsort(descending=True).tolist().index(token.token_id) + 1
        assert token.logprob == pytest.approx(expected_SV[row, token.token_id].item(), abs=1e-6)
    for each in first:
        assert each.logprob == pytest.approx(expected_SV[0, each.token_id].item(), abs=1e-6)


def test_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits_SV = (torch.randn(2, 40, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    sampler = sampler_with(40, *((SamplingParams(logprobs=3), slot, [2], [1], []) for slot in range(2)))
    expected_SV = logits_SV.double().log_softmax(-1)
    for row, listed in enumerate(step(sampler, logits_SV, [0, 1]).logprobs):
        for each in listed:
            assert each.logprob == pytest.approx(expected_SV[row, each.token_id].item(), abs=1e-5)


def test_nobody_asked_so_there_are_none():
    sampler = sampler_with(4, (SamplingParams(), 0, [], [], []))
    assert step(sampler, torch.zeros(1, 4), [0]).logprobs is None


def test_equal_tokens_share_a_rank():
    sampler = sampler_with(4, (SamplingParams(temperature=0, logprobs=20), 0, [], [], []))
    (row,) = step(sampler, torch.tensor([[1.0, 2.0, 2.0, 0.0]]), [0]).logprobs
    assert [each.rank for each in row] == [1, 1, 1, 3, 4]
    assert len(row) == 5  # the vocabulary is smaller than what was asked for


def test_prompt_logprobs_follow_the_prompt():
    logits_RV = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    following = [3, 0, 29, 7, 7, 11]
    rows = Sampler(1, 30, "cpu").prompt_logprobs(logits_RV, torch.tensor(following, dtype=torch.int32), 2)
    expected_RV = logits_RV.log_softmax(-1)
    for row, token_id, listed in zip(range(6), following, rows, strict=True):
        assert [each.token_id for each in listed] == [token_id, *logits_RV[row].topk(2).indices.tolist()]
        assert listed[0].logprob == pytest.approx(expected_RV[row, token_id].item(), abs=1e-6)
        assert listed[0].rank == 1 + int((logits_RV[row] > logits_RV[row, token_id]).sum())
    assert [len(listed) for listed in Sampler(1, 30, "cpu").prompt_logprobs(logits_RV, torch.tensor(following), 0)] == [
        1
    ] * 6
