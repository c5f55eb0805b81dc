"""The offline API: what its options mean, measured on transformers; and what it says to bad input."""

from __future__ import annotations

import math

import pytest
import torch
from runtime.inprocess import local_llm
from runtime.processes import engine, no_leaks
from runtime.reference import greedy, logits_of, token_ids
from runtime.stepping import random_prompts
from runtime.tiny_models import VOCAB_SIZE, make

from gllm import LLM, SamplingParams
from gllm.runtime.default_model import PATH
from gllm.runtime.errors import EngineDeadError

PROMPTS = random_prompts((1, 3, 41, 10, 70, 16, 17, 33, 5, 25), VOCAB_SIZE)
EOS = (2, 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, transformers' model)."""
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, make("qwen3", folder)


@pytest.fixture(scope="module")
def shared_llm(tiny):
    with local_llm(tiny[0]) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    assert not shared_llm._generations._streams
    shared_llm._client.drain()


@pytest.fixture(scope="module")
def shared_texts():
    with local_llm(PATH, block_size=16) as llm:
        yield llm


@pytest.fixture
def texts(shared_texts):
    """With a tokenizer: the default model."""
    yield shared_texts
    shared_texts._client.drain()


def answer(llm, prompt, **params):
    """The one answer to one prompt, greedy unless told otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 32} | params)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]


def theirs(model, prompt, num_tokens, **options):
    """What transformers' generate answers."""
    options = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0} | options
    tokens = torch.tensor([prompt])  # a 0 among them is a token like any other, no padding
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def stopping(tiny):
    """A prompt whose greedy answer ends with EOS after at least four tokens, and that answer."""
    for prompt in random_prompts([8] * 20, VOCAB_SIZE, seed=3):
        whole = theirs(tiny[1], prompt, 40)
        if 4 <= len(whole) < 30:
            return prompt, whole
    pytest.fail("no prompt's answer ends in time")


def test_answers_end_where_those_of_transformers_end(tiny, llm):
    params = SamplingParams(temperature=0.0, max_tokens=64)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert token_ids(outputs) == [theirs(tiny[1], prompt, 64) for prompt in PROMPTS]
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["stop" if answer[-1] in EOS else "length" for answer in token_ids(outputs)]
    assert set(reasons) == {"stop", "length"}
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert all(output.finished for output in outputs)


def test_eos_as_the_last_token_allowed_is_a_stop(llm, stopping):
    prompt, whole = stopping
    exact, short = answer(llm, prompt, max_tokens=len(whole)), answer(llm, prompt, max_tokens=len(whole) - 1)
    assert (exact.token_ids, exact.finish_reason, exact.stop_reason) == (whole, "stop", None)
    assert (short.token_ids, short.finish_reason) == (whole[:-1], "length")


def test_ignore_eos_goes_on(llm, stopping):
    prompt, whole = stopping
    got = answer(llm, prompt, max_tokens=40, ignore_eos=True)
    assert got.token_ids[: len(whole)] == whole
    assert (len(got.token_ids), got.finish_reason) == (40, "length")


def test_min_tokens_shuts_eos_out(tiny, llm, stopping):
    prompt, whole = stopping
    got = answer(llm, prompt, max_tokens=60, min_tokens=len(whole) + 5)
    assert got.token_ids == theirs(tiny[1], prompt, 60, min_new_tokens=len(whole) + 5)
    assert len(got.token_ids) >= len(whole) + 5
    assert answer(llm, prompt, min_tokens=len(whole) - 1).token_ids == whole
    assert answer(llm, prompt, min_tokens=len(whole)).token_ids[: len(whole)] != whole


def test_a_stop_token_is_named(llm, stopping):
    prompt, whole = stopping
    got = answer(llm, prompt, stop_token_ids=[whole[2], 130])
    first = whole.index(whole[2])
    assert (got.token_ids, got.finish_reason, got.stop_reason) == (whole[: first + 1], "stop", whole[2])
    later = answer(llm, prompt, stop_token_ids=[whole[2]], min_tokens=10)
    assert whole[2] not in later.token_ids[:10]


def test_no_max_tokens_goes_to_the_models_end(tiny):
    with local_llm(tiny[0], max_model_len=50) as llm:
        got = answer(llm, PROMPTS[2], max_tokens=None, ignore_eos=True)
        assert (len(got.token_ids), got.finish_reason) == (50 - 41, "length")


def test_logit_bias_decides(llm):
    free = answer(llm, PROMPTS[3], max_tokens=8)
    assert answer(llm, PROMPTS[3], max_tokens=8, logit_bias={77: 100.0}).token_ids == [77] * 8
    assert (
        free.token_ids[0] not in answer(llm, PROMPTS[3], max_tokens=8, logit_bias={free.token_ids[0]: -100}).token_ids
    )


def test_repetition_penalty_is_transformers(tiny, llm):
    got = answer(llm, PROMPTS[2], max_tokens=48, repetition_penalty=1.4)
    assert got.token_ids == theirs(tiny[1], PROMPTS[2], 48, repetition_penalty=1.4)
    assert got.token_ids != theirs(tiny[1], PROMPTS[2], 48)


def test_n_answers_have_seeds_in_a_row(llm):
    params = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    output = llm.generate([PROMPTS[5]], SamplingParams(n=3, seed=7, **params), use_tqdm=False)[0]
    assert [each.index for each in output.outputs] == [0, 1, 2]
    alone = [answer(llm, PROMPTS[5], seed=seed, **params).token_ids for seed in (7, 8, 9)]
    assert token_ids([output]) == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_without_a_seed_every_answer_is_another(llm):
    params = SamplingParams(n=4, temperature=1.5, max_tokens=12, ignore_eos=True)
    output = llm.generate([PROMPTS[5]], params, use_tqdm=False)[0]
    assert len({tuple(tokens) for tokens in token_ids([output])}) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_transformers(tiny, llm, temperature):
    options = {"temperature": temperature, "seed": 1, "max_tokens": 20, "ignore_eos": True, "logprobs": 3}
    got = answer(llm, PROMPTS[7], **options)
    logprobs = logits_of(tiny[1], PROMPTS[7] + got.token_ids).log_softmax(-1)[len(PROMPTS[7]) - 1 : -1]
    assert len(got.logprobs) == 20
    for token, place, row in zip(got.token_ids, got.logprobs, logprobs, strict=True):
        assert_is_row(place, row, token, 3)
    chosen = logprobs.gather(-1, torch.tensor(got.token_ids)[:, None])
    assert got.cumulative_logprob == pytest.approx(chosen.sum().item(), abs=1e-3)
    bare = answer(llm, PROMPTS[7], **{**options, "logprobs": 0})
    assert [list(place) for place in bare.logprobs] == [[token] for token in got.token_ids]


def assert_is_row(place, row, token, num):
    """The token and the likeliest ones, with their log-probabilities and ranks."""
    order = row.argsort(descending=True).tolist()
    assert list(place) == list(dict.fromkeys([token, *order[:num]]))
    for token_id, entry in place.items():
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert entry.rank == order.index(token_id) + 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pp": 2, "policy": "sarathi:token_budget=7"},
        {"pp": 3, "max_in_flight": 4, "num_blocks": 30},
        {"policy": "throttle:min_prefill=4,max_prefill=6", "num_blocks": 30},  # preempts prompts that are half done
    ],
    ids=str,
)
def test_prompt_logprobs_are_transformers(tiny, options):
    params = SamplingParams(temperature=0.0, max_tokens=30, prompt_logprobs=2, ignore_eos=True)
    with local_llm(tiny[0], **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert bool(llm._client.stats.num_preemptions) == ("num_blocks" in options)
    for prompt, output in zip(PROMPTS, outputs, strict=False):
        logprobs = logits_of(tiny[1], prompt).log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for token, place, row in zip(prompt[1:], output.prompt_logprobs[1:], logprobs, strict=False):
            assert_is_row(place, row, token, 2)


def test_prompt_logprobs_of_a_cached_prompt_are_computed_again(llm):
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    answer(llm, PROMPTS[4])
    output = llm.generate([PROMPTS[4]], params, use_tqdm=False)[0]
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == len(PROMPTS[4])


def test_a_prompt_seen_before_is_found(tiny):
    with local_llm(tiny[0]) as llm:
        first, second = (llm.generate([PROMPTS[4]], greedy(8), use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 68  # the last block of 70 is not full
    assert token_ids([first]) == token_ids([second])


def test_a_conversations_next_turn_finds_the_answer_before(tiny, stopping):
    prompt, whole = stopping
    with local_llm(tiny[0]) as llm:
        assert answer(llm, prompt).token_ids == whole
        followed = prompt + whole + PROMPTS[6]
        output = llm.generate([followed], greedy(24), use_tqdm=False)[0]
    assert output.num_cached_tokens == (len(prompt + whole) - 1) // 4 * 4 > len(prompt)
    with local_llm(tiny[0], prefix_caching=False) as llm:
        fresh = llm.generate([followed], greedy(24), use_tqdm=False)[0]
    assert fresh.num_cached_tokens == 0
    assert token_ids([fresh]) == token_ids([output])


def test_a_stream_is_the_answer_in_pieces_and_may_be_left(llm):
    deltas = list(llm.stream(PROMPTS[6], greedy(20, n=2)))
    whole = answer(llm, PROMPTS[6], max_tokens=20, ignore_eos=True).token_ids
    for index in range(2):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.token_ids] == whole
        assert [delta.finish_reason for delta in mine] == [None] * 19 + ["length"]
    stream = llm.stream(PROMPTS[6], greedy(100))
    next(stream)
    stream.close()  # what is left is aborted: the fixture looks


def test_prompts_and_parameters_in_all_their_forms(llm):
    one = token_ids(llm.generate(PROMPTS[3], greedy(5), use_tqdm=False))
    assert token_ids(llm.generate([PROMPTS[3]], [greedy(5)], use_tqdm=False)) == one
    assert token_ids(llm.generate({"prompt_token_ids": PROMPTS[3]}, greedy(5), use_tqdm=False)) == one
    assert token_ids(llm.generate([tuple(PROMPTS[3]), torch.tensor(PROMPTS[3])], greedy(5), use_tqdm=False)) == one * 2
    assert llm.generate([], greedy(5), use_tqdm=False) == []


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1, 2], []], None, "the prompt is empty"),
        ([[1, 2], [5] * 256], None, "the prompt has 256 tokens; .* may have 256"),
        ([[1, 2], [131]], None, "token ids outside the model's vocabulary, 0 to 130"),
        ([[1, 2], [-1]], None, "token ids outside the model's vocabulary"),
        ([[1, 2], [1.5]], None, r"a prompt is \[1.5\]; give a text or a list of token ids"),
        ([[1, 2], {"text": "x"}], None, "a prompt is None; give a text or a list of token ids"),
        ([[1, 2], "text"], None, "has no tokenizer; give prompts as token ids"),
        ([[1, 2], [3]], [SamplingParams()], "1 sampling_params for 2 prompts"),
        ([[1, 2]], {"temperature": 0.0}, "give SamplingParams"),
        ([[1, 2]], [{"temperature": 0.0}], "give SamplingParams"),
        ([[1, 2]], SamplingParams(stop_token_ids=[131]), "stop_token_ids names token 131"),
        ([[1, 2]], SamplingParams(logit_bias={200: 1.0}), "logit_bias names token 200"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        llm.generate(prompts, params or greedy(4), use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert llm._client.loop.engine.num_unfinished == 0
    assert not llm._client.loop._arrived  # and the fixture looks for what it left


def test_chat_needs_a_template(llm):
    with pytest.raises(ValueError, match="has no chat template; use generate"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_a_whole_cache_is_the_longest_prompt(tiny):
    with local_llm(tiny[0], num_blocks=10) as llm:
        with pytest.raises(ValueError, match="the prompt has 40 tokens; prompt and answer together may have 40"):
            answer(llm, [5] * 40)
        assert answer(llm, [5] * 39, ignore_eos=True).finish_reason == "length"


TASK = "Sort: 5 3 8 1 9 2 ="


def test_text_is_the_tokens_decoded(texts):
    output = texts.generate(TASK, SamplingParams(temperature=1.0, seed=3, max_tokens=40), use_tqdm=False)[0]
    assert output.prompt == TASK
    assert output.prompt_token_ids == texts.tokenizer.encode(TASK)
    got = output.outputs[0]
    ends = got.finish_reason == "stop"
    shown = got.token_ids[:-1] if ends else got.token_ids
    assert got.text == texts.tokenizer.decode(shown, skip_special_tokens=True)


def test_a_stop_string_ends_the_answer_before_it(texts):
    free = answer(texts, TASK, ignore_eos=True, max_tokens=40)
    stop = free.text[4:6]
    place = free.text.index(stop)
    got = answer(texts, TASK, ignore_eos=True, max_tokens=40, stop=["never", stop])
    assert (got.text, got.finish_reason, got.stop_reason) == (free.text[:place], "stop", stop)
    assert len(got.token_ids) < 40
    whole = answer(texts, TASK, ignore_eos=True, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert whole.text == free.text[: place + 2]
    silent = answer(texts, TASK, ignore_eos=True, max_tokens=40, detokenize=False)
    assert (silent.text, silent.token_ids) == ("", free.token_ids)


def test_a_stop_string_of_one_answer_leaves_the_others_alone(texts):
    params = {"temperature": 1.5, "ignore_eos": True, "max_tokens": 30}
    free = [answer(texts, TASK, seed=seed, **params) for seed in range(4)]
    stop = free[2].text[10:13]
    outputs = texts.generate(TASK, SamplingParams(n=4, seed=0, stop=stop, **params), use_tqdm=False)[0].outputs
    assert outputs[2].stop_reason == stop
    for got, whole in zip(outputs, free, strict=True):
        assert got.text == whole.text.partition(stop)[0]
        assert got.finish_reason == ("stop" if stop in whole.text else "length")


def test_chat_and_its_stream_answer_alike(texts):
    messages = [{"role": "user", "content": "Copy: abc"}]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    output = texts.chat(messages, params, use_tqdm=False)[0]
    assert output.prompt == texts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == "".join(delta.text for delta in texts.stream_chat(messages, params))
    both = texts.chat([messages, messages], params, use_tqdm=False)
    assert [each.outputs[0].text for each in both] == [output.outputs[0].text] * 2


def test_logprobs_name_their_tokens(texts):
    got = answer(texts, TASK, max_tokens=3, logprobs=1)
    for token, place in zip(got.token_ids, got.logprobs, strict=True):
        assert place[token].decoded_token == texts.tokenizer.decode([token])
        assert place[token].rank == 1
        assert math.exp(place[token].logprob) <= 1


def test_the_default_model_over_processes(texts):
    with engine(block_size=16) as llm:
        here = llm.generate([TASK, "abc"], greedy(24), use_tqdm=True)
        assert token_ids(here) == token_ids(texts.generate([TASK, "abc"], greedy(24), use_tqdm=False))
        assert all(each.outputs[0].text for each in here)
        stream = llm.stream(TASK, greedy(200))
        next(stream)
        stream.close()
        with pytest.raises(ValueError, match="the prompt is empty"):
            llm.generate("", use_tqdm=False)


def test_a_closed_llm_says_so(tiny):
    with no_leaks():
        llm = LLM(str(tiny[0]), device="cpu")
        llm.close()
        llm.close()
        with pytest.raises(EngineDeadError, match="closed"):
            llm.generate([[1, 2]], use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "unknown option 'pipeline_parallel_size'; known: pp, tp, "),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"pp": 0}, "--pp is 0"),
        ({"pp": 4}, "--pp 4 is more than the 3 layers"),
        ({"tp": 3}, "--tp 3 does not divide"),
        ({"tp": 2, "ep": 2}, "has no experts"),
        ({"max_model_len": 257}, "--max-model-len 257 is more than the 256 positions"),
        ({"device": "tpu"}, "Invalid enum value 'tpu' - at `$.device`"),
        ({"max_num_seqs": "8"}, "Expected `int`, got `str` - at `$.max_num_seqs`"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_one_line_before_anything_starts(tiny, options, message, monkeypatch):
    monkeypatch.setattr("gllm.runtime.process.start", None)
    with no_leaks(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        LLM(str(tiny[0]), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_model_is_one_line(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with no_leaks(), pytest.raises(ValueError, match=str(folder)) as caught:
            LLM(str(folder))
        assert "\n" not in str(caught.value)


def test_what_only_the_workers_see_is_one_line_too(tmp_path):
    make("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with no_leaks(), pytest.raises(ValueError, match=r"neither model\.safetensors nor") as caught:
        LLM(str(tmp_path), device="cpu", tp=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"pp": 2, "max_in_flight": 1}, "max_in_flight is 1"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_anything_starts(options, said):
    with pytest.raises(ValueError, match=said):
        LLM(**options)
