"""`POST /v1/completions`: prompts of every kind, whole and streamed answers, log-probabilities, echo."""

import pytest
from runtime.fake_engine import FakeEngine, complete, error_of, events, ids


def texts(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_an_answer_has_openais_shape():
    engine = FakeEngine(num_cached_tokens=1)
    answer = complete(engine, model="alias/fake", prompt="hey").json()
    name = answer.pop("id")
    assert name.startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    choice = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    usage["prompt_tokens_details"] = {"cached_tokens": 1}
    assert answer == {"object": "text_completion", "model": "alias/fake", "choices": [choice], "usage": usage}


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("hi", [ids("hi")]),
        (["hi", "you"], [ids("hi"), ids("you")]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
def test_prompts_of_every_kind(prompt, seen):
    engine = FakeEngine()
    assert texts(complete(engine, prompt=prompt)) == ["hello"] * len(seen)
    assert sorted(call[0] for call in engine.calls) == sorted(seen)


def test_several_prompts_with_several_answers_are_ordered_by_prompt():
    engine = FakeEngine(num_cached_tokens=1)
    answer = complete(engine, prompt=["a", "bc"], n=2, echo=True).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["ahello", "ahello", "bchello", "bchello"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert engine.num_running == engine.num_aborted == 0


def test_sixteen_tokens_are_the_default_and_the_model_the_limit():
    engine = FakeEngine(answer="x" * 300)
    assert texts(complete(engine)) == ["x" * 16]
    assert texts(complete(engine, prompt="p" * 190)) == ["x" * 10]
    assert texts(complete(engine, prompt="p" * 190, max_tokens=10)) == ["x" * 10]
    assert complete(engine).json()["choices"][0]["finish_reason"] == "length"


def test_a_request_longer_than_the_model_names_both_numbers():
    error = error_of(complete(FakeEngine(), prompt="p" * 200), 400)
    assert "200" in error["message"]
    assert error["param"] == "prompt"
    error = error_of(complete(FakeEngine(), prompt="p" * 190, max_tokens=11), 400)
    assert "190" in error["message"]
    assert "at most 10" in error["message"]
    assert error["param"] == "max_tokens"


def test_what_the_body_asks_for_reaches_the_engine_and_the_model_says_the_rest():
    engine = FakeEngine(defaults={"temperature": 0.6, "top_k": 20, "eos_token_id": 3, "min_p": None})
    complete(engine, temperature=0, stop="x", logit_bias={"7": 3}, seed=5, min_tokens=2, priority=-4, ignore_eos=True)
    _, params, priority = engine.calls[0]
    assert priority == -4
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 20, 1.0, 0.0)
    assert (params.stop_strings, params.logit_bias, params.seed, params.min_tokens) == (("x",), {7: 3}, 5, 2)
    assert params.ignore_eos
    assert params.max_tokens == 16


def test_nulls_stand_for_fields_left_out():
    engine = FakeEngine()
    complete(engine, temperature=None, stop=None, n=None, stream=None, echo=None, logprobs=None, max_tokens=None)
    assert engine.calls[0][1].temperature == 1.0


def test_a_stream_says_the_same_as_a_whole_answer():
    got = events(complete(FakeEngine(), stream=True))
    assert got.pop() == "[DONE]"
    assert "".join(each["choices"][0]["text"] for each in got) == "hello"
    assert [each["choices"][0]["finish_reason"] for each in got] == [None] * 4 + ["stop"]
    assert len({each["id"] for each in got}) == 1
    assert all("usage" not in each for each in got)
    assert {each["object"] for each in got} == {"text_completion"}


def test_a_stream_of_several_prompts_and_answers_is_told_apart_by_index():
    got = events(complete(FakeEngine(delay_s=0.001), prompt=["a", "b"], n=2, stream=True, echo=True))
    said = dict.fromkeys(range(4), "")
    for each in got[:-1]:
        said[each["choices"][0]["index"]] += each["choices"][0]["text"]
    assert said == {0: "ahello", 1: "ahello", 2: "bhello", 3: "bhello"}


def test_usage_comes_last_in_a_stream_that_asks_for_it():
    got = events(complete(FakeEngine(), stream=True, stream_options={"include_usage": True}))
    assert [each["usage"] for each in got[:-2]] == [None] * 5
    assert got[-2]["choices"] == []
    assert got[-2]["usage"]["completion_tokens"] == 5
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = events(complete(FakeEngine(), stream=True, stream_options=options))
    assert [each["usage"]["completion_tokens"] for each in got[:-1]] == [1, 2, 3, 4, 5, 5]


def test_steps_without_text_send_nothing():
    got = events(complete(FakeEngine(hold_text=True), stream=True))
    assert [each["choices"][0]["text"] for each in got[:-1]] == ["hello"]


def test_logprobs_have_openais_shape():
    choice = complete(FakeEngine(answer="bd"), logprobs=3).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["b", "d"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"c": -0.5, "b": -1.5, "a": -9999.0}, {"e": -0.5, "d": -1.5, "c": -9999.0}],
        "text_offset": [0, 1],
    }
    choice = complete(FakeEngine(answer="bd"), logprobs=0).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"b": -1.5}, {"d": -1.5}]
    choice = complete(FakeEngine(answer="bd"), logprobs=1).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"c": -0.5, "b": -1.5}, {"e": -0.5, "d": -1.5}]


@pytest.mark.parametrize("hold_text", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_join_to_the_whole_ones(echo, hold_text):
    body = {"prompt": "xyz", "logprobs": 2, "echo": echo}
    whole = complete(FakeEngine(), **body).json()["choices"][0]
    joined = {name: [] for name in whole["logprobs"]}
    for each in events(complete(FakeEngine(hold_text=hold_text), stream=True, **body))[:-1]:
        for name, values in each["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == whole["logprobs"]
    assert whole["text"] == ("xyzhello" if echo else "hello")
    assert "".join(joined["tokens"]) == whole["text"]


def test_an_echo_begins_with_a_token_that_nothing_predicts():
    logprobs = complete(FakeEngine(), prompt="xy", echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1] == -1.5
    assert logprobs["text_offset"] == list(range(7))


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_generates_nothing(stream):
    response = complete(FakeEngine(), prompt=ids("xy"), echo=True, logprobs=0, max_tokens=0, stream=stream)
    choice = (events(response)[0] if stream else response.json())["choices"][0]
    assert choice["text"] == "xy"
    assert choice["logprobs"]["tokens"] == ["x", "y"]
    assert choice["finish_reason"] == "length"
    assert stream or response.json()["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_in_vllms_form():
    choice = complete(FakeEngine(), prompt=[70, 71], prompt_logprobs=1).json()["choices"][0]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second.keys() == {"71", "72"}
    assert second["71"]["logprob"] == -1.5
    assert second["71"]["rank"] == 2


def test_without_a_tokenizer_tokens_go_in_and_out():
    choice = complete(FakeEngine(tokenizer=None), prompt=[7, 8], logprobs=0).json()["choices"][0]
    assert choice["logprobs"]["tokens"][0] == f"token_id:{ids('h')[0]}"
    assert "no tokenizer" in error_of(complete(FakeEngine(tokenizer=None)), 400)["message"]


def test_a_text_beyond_ascii_survives():
    assert texts(complete(FakeEngine(max_model_len=999), prompt="größe 🙂 長い", echo=True)) == ["größe 🙂 長いhello"]
    got = events(complete(FakeEngine(), prompt="größe 🙂", echo=True, stream=True))
    assert got[0]["choices"][0]["text"] == "größe 🙂h"
