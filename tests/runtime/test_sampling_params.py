"""Sampling parameters: vLLM's defaults, one line for each mistake, whole after a trip through msgspec, no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest

from gllm.runtime.sampling_params import SamplingParams

FULL = {
    "n": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 2,
    "logit_bias": {5: 1.5, 7: -100},
    "seed": 2**64 - 1,
    "stop": ["\n\n", "END"],
    "stop_token_ids": [2, 3],
    "ignore_eos": True,
    "max_tokens": None,
    "min_tokens": 4,
    "logprobs": 20,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}


def test_the_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.prompt_logprobs) == (16, 0, None, None)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.seed) == ((), (), None, None)
    assert (params.is_greedy, params.needs_penalties, params.needs_filter) == (False, False, False)


@pytest.mark.parametrize("options", [{}, FULL, {"stop": "x"}, {"logit_bias": {"12": 3}}])
def test_a_message_brings_it_back_equal(options):
    params = SamplingParams(**options)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert back == params
    assert isinstance(back.stop_strings, tuple)
    assert replace(back, n=2) == replace(params, n=2)


def test_a_message_with_a_bad_value_is_refused_too():
    with pytest.raises(msgspec.ValidationError, match="top_p is 2"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 2.0}), type=SamplingParams)


def test_collections_take_one_form():
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], logit_bias={"3": 1, 4: 0.5})
    assert params.stop == params.stop_strings == ("END",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {3: 1, 4: 0.5}
    assert SamplingParams(logit_bias={}).logit_bias is None


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("n", 0, "a whole number of at least 1"),
        ("n", True, "a whole number of at least 1"),
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", float("nan"), "a number of at least 0"),
        ("temperature", float("inf"), "a number of at least 0"),
        ("temperature", "1", "a number of at least 0"),
        ("top_p", 0, "a number above 0 and at most 1"),
        ("top_p", 1.01, "a number above 0 and at most 1"),
        ("top_k", -2, "a whole number of at least -1"),
        ("top_k", 50.0, "a whole number of at least -1"),
        ("min_p", -0.01, "a number from 0 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("presence_penalty", 2.1, "a number from -2 to 2"),
        ("frequency_penalty", -2.1, "a number from -2 to 2"),
        ("max_tokens", 0, "a whole number of at least 1"),
        ("max_tokens", 2**63, "a whole number of at least 1"),
        ("min_tokens", -1, "a whole number of at least 0"),
        ("min_tokens", None, "a whole number of at least 0"),
        ("logprobs", 21, "a whole number from 0 to 20"),
        ("logprobs", -1, "a whole number from 0 to 20"),
        ("prompt_logprobs", 21, "a whole number from 0 to 20"),
        ("seed", 1.5, "a whole number of at most 64 bits"),
        ("seed", 2**64, "a whole number of at most 64 bits"),
        ("ignore_eos", 1, "true or false"),
        ("detokenize", None, "true or false"),
        ("stop_token_ids", 7, "a list"),
        ("stop", 7, "a list"),
        ("stop", {"END": 1}, "a list"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(option, value, rule):
    with pytest.raises(ValueError, match=option) as raised:
        SamplingParams(**{option: value})
    assert str(raised.value) == f"{option} is {value!r}; it must be {rule}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_tokens": 17}, "min_tokens is 17; it must not exceed max_tokens, which is 16"),
        ({"stop": "x", "detokenize": False}, "stop strings are looked for in the text"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"stop": ["a", 3]}, "stop holds 3"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids holds -1"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids holds '1'"),
        ({"logit_bias": [1, 2]}, "it must map token ids to numbers"),
        ({"logit_bias": 0}, "it must map token ids to numbers"),
        ({"logit_bias": {"x": 1}}, "logit_bias names token 'x'"),
        ({"logit_bias": {-1: 1}}, "logit_bias names token -1"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101; it must be a number from -100 to 100"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1 is None"),
    ],
)
def test_what_is_wrong_inside_or_together_is_named(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        SamplingParams(**options)
    assert "\n" not in str(raised.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=2)


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (0.0, True), (9e-6, True), (1e-5, False)])
def test_tiny_temperatures_are_greedy(temperature, is_greedy):
    params = SamplingParams(temperature=temperature, top_k=5)
    assert params.is_greedy == is_greedy
    assert params.needs_filter != is_greedy


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.99}, {"min_p": 0.01}])
def test_each_filter_is_a_filter(options):
    assert SamplingParams(**options).needs_filter
    assert not SamplingParams(top_k=-1).needs_filter


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 0.9}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}]
)
def test_each_penalty_is_a_penalty(options):
    assert SamplingParams(**options).needs_penalties


def test_answers_of_one_request_have_seeds_of_their_own():
    params = SamplingParams(seed=2**64 - 1, n=3)
    assert [params.seed_of(index) for index in range(3)] == [2**64 - 1, 0, 1]
    assert SamplingParams(seed=-5).seed_of(0) == 2**64 - 5
    for unseeded in (SamplingParams(), SamplingParams(seed=-1)):
        drawn = {unseeded.seed_of(0) for _ in range(50)}
        assert len(drawn) == 50
        assert all(0 <= seed < 2**64 for seed in drawn)


@pytest.mark.parametrize(
    ("options", "option"), [({"stop_token_ids": [9, 10]}, "stop_token_ids"), ({"logit_bias": {10: 1}}, "logit_bias")]
)
def test_tokens_the_model_lacks_are_refused(options, option):
    params = SamplingParams(**options)
    params.check_vocab(11)
    with pytest.raises(ValueError, match=f"{option} names token 10; this model's ids end at 9"):
        params.check_vocab(10)


def test_the_front_end_pieces_load_no_torch():
    code = "import sys, gllm.runtime.sampling_params, gllm.runtime.detokenizer; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert run.stdout.strip() == "False"
