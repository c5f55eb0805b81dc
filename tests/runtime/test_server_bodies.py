"""What a request's body may not hold: 400, one line in OpenAI's shape, and the server lives on."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime.fake_engine import FakeEngine, ask, chat, complete, error_of

from gllm.runtime.server.app import create_app
from gllm.runtime.server.errors import ApiError
from gllm.runtime.server.protocol import ChatBody, CompletionBody

JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "must be a string"),
        ({"prompt": 3}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": [-1]}, "prompt", "must be a string"),
        ({"prompt": [2**31]}, "prompt", "must be a string"),
        ({"prompt": [[1], "a"]}, "prompt", "must be a string"),
        ({"max_tokens": "16"}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": -1}, "max_tokens", "0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 10**30}, "max_tokens", ""),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_p": 0}, "top_p", "top_p"),
        ({"top_p": 1.1}, "top_p", "top_p"),
        ({"n": 0}, "n", "1"),
        ({"n": 10**6}, "n", "128"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"min_tokens": 17}, "min_tokens", "min_tokens"),
        ({"stop": 3}, "stop", "string"),
        ({"stop": [""]}, "stop", "stop"),
        ({"stop": ["a", 1]}, "stop", "string"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "integer"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
        ({"logit_bias": [1]}, "logit_bias", "dictionary"),
        ({"seed": 2**70}, "seed", "64 bits"),
        ({"priority": 2**31}, "priority", ""),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream'"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "stream_options.usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "streamed"),
        ({"stream": True, "echo": True, "logprobs": 1, "n": 2}, "echo", "streamed"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ],
)
def test_completions_refuse(body, param, says):
    engine = FakeEngine()
    error = error_of(complete(engine, **body), 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert says in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": ["hi"]}, "messages", ""),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages", "user"),
        ({"messages": [{"content": "hi"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages", "needs 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "text"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "x"}]}, "messages", "messages.0.mood"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, None, "20"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"prompt": "hi"}, "prompt", "unknown field"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_chat_refuses(body, param, says):
    engine = FakeEngine()
    error = error_of(chat(engine, **body), 400)
    assert says in error["message"]
    assert param is None or error["param"] == param
    assert engine.calls == []


NEUTRAL = {
    "response_format": {"type": "text"},
    "bad_words": [],
    "use_beam_search": False,
    "spaces_between_special_tokens": True,
    "user": "me",
    "metadata": {"a": "b"},
}


def test_options_that_ask_for_nothing_are_let_through():
    assert complete(FakeEngine(), **NEUTRAL, suffix=None, best_of=1).status_code == 200
    extra = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "store": False}
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "annotations": []}]
    assert chat(FakeEngine(), **NEUTRAL, **extra, messages=history).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b'"hi"', b"null", b'{"prompt": 1' + b"0" * 5000 + b"}"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_is_no_json_object(path, content):
    assert error_of(ask(FakeEngine(), path, content=content, headers=JSON), 400)["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "hi", "temperature": NaN}', "finite"),
        (b'{"prompt": "hi", "temperature": 1e999}', "finite"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "hi", "stop": "\\ud800"}', "stop"),
        (b'{"prompt": "hi", "\\ud800": 1}', "unicode"),
        (b'{"prompt": "hi", "metadata": {"\\ud800": 1}}', "metadata"),
    ],
)
def test_what_json_can_write_and_nobody_should(content, says):
    assert says in error_of(ask(FakeEngine(), "/v1/completions", content=content, headers=JSON), 400)["message"]


def test_a_body_that_does_not_say_that_it_is_json():
    response = ask(FakeEngine(), "/v1/completions", content=b'{"prompt": "hi"}', headers={"Content-Type": "text/plain"})
    assert "application/json" in error_of(response, 400)["message"]


def test_an_error_can_always_be_written():
    assert b"a?b" in ApiError(400, "a\ud800b").response().body


def test_a_missing_field_is_named():
    assert error_of(ask(FakeEngine(), "/v1/completions", {}), 400)["param"] == "prompt"
    assert error_of(ask(FakeEngine(), "/v1/chat/completions", {}), 400)["param"] == "messages"


def test_a_wrong_model_is_not_found():
    for response in (complete(FakeEngine(), model="gpt"), chat(FakeEngine(), model="gpt")):
        error = error_of(response, 404)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
        assert "fake" in error["message"]


def test_paths_and_methods_that_are_not_there():
    assert "/v1/nothing" in error_of(ask(FakeEngine(), "/v1/nothing"), 404)["message"]
    assert error_of(ask(FakeEngine(), "/v1/completions"), 405)["type"] == "MethodNotAllowedError"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
def test_what_the_engine_refuses_is_the_clients_error(stream, prompt):
    response = complete(FakeEngine(refuse="token 9 is not one of the model's"), prompt=prompt, stream=stream)
    assert error_of(response, 400)["message"] == "token 9 is not one of the model's"


def test_what_the_endpoints_take_is_written_down():
    schemas = ask(FakeEngine(), "/openapi.json").json()["components"]["schemas"]
    assert {"prompt", "echo", "temperature"} <= schemas["CompletionBody"]["properties"].keys()
    assert "messages" in schemas["ChatBody"]["required"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
APP = create_app(FakeEngine())


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/completions", CompletionBody), ("/v1/chat/completions", ChatBody)], ids=["text", "chat"]
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_json_whatever_breaks_the_server(path, kind, data):
    names = st.sampled_from(sorted({*kind.model_fields, *kind.NEUTRAL}))
    body = {"prompt": "hi"} if kind is CompletionBody else {"messages": USER}
    body |= data.draw(st.dictionaries(names, ANYTHING, max_size=2))
    response = ask(None, path, body, app=APP)
    assert response.status_code == 200 or error_of(response, response.status_code)["code"] in (400, 404)
