"""`POST /v1/chat/completions`: conversations, templates, whole and streamed answers."""

import pytest
from runtime.fake_engine import FakeEngine, byte_tokenizer, chat, error_of, events


def heard(engine):
    """The text that reached the engine."""
    return byte_tokenizer().decode(engine.calls[-1][0])


def test_an_answer_has_openais_shape():
    answer = chat(FakeEngine()).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": "hello", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 26}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    assert answer == {"object": "chat.completion", "model": "fake", "choices": [choice], "usage": usage}


def test_the_template_writes_the_conversation():
    engine = FakeEngine()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = chat(engine).json()["choices"][0]["message"]
    chat(engine, messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}, said])
    assert heard(engine) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_client_may_tell_the_template():
    engine = FakeEngine()
    chat(engine, chat_template_kwargs={"mood": "calm"})
    assert heard(engine).endswith("<|im_start|>assistant\n(calm)")
    chat(engine, add_generation_prompt=False)
    assert heard(engine) == "<|im_start|>user\nhi<|im_end|>\n"
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    chat(engine, messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert heard(engine).endswith("<|im_start|>assistant\nOnce")


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "conversation", "return_dict"])
def test_what_a_client_may_not_tell_the_template(name):
    error = error_of(chat(FakeEngine(), chat_template_kwargs={name: "x"}), 400)
    assert name in error["message"]
    assert error["param"] == "chat_template_kwargs"


def test_the_servers_template_goes_before_the_tokenizers():
    engine = FakeEngine(chat_template="{{ messages[0].content }}!")
    chat(engine)
    assert heard(engine) == "hi!"


def test_a_template_that_refuses_is_the_clients_error():
    messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}]
    assert "the system message comes first" in error_of(chat(FakeEngine(), messages=messages), 400)["message"]


def test_a_model_without_a_template_says_so():
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer)
    assert "--chat-template" in error_of(chat(FakeEngine(tokenizer=bare)), 400)["message"]
    assert chat(FakeEngine(tokenizer=bare, chat_template="{{ messages[0].content }}")).status_code == 200


def test_an_answer_may_fill_the_model_unless_told_otherwise():
    engine = FakeEngine(answer="x" * 300)
    assert chat(engine).json()["usage"]["total_tokens"] == 200
    assert chat(engine, max_tokens=3).json()["choices"][0]["message"]["content"] == "xxx"
    assert chat(engine, max_completion_tokens=4).json()["choices"][0]["message"]["content"] == "xxxx"
    assert chat(engine, max_completion_tokens=4, max_tokens=4).status_code == 200
    assert error_of(chat(engine, max_completion_tokens=4, max_tokens=3), 400)["param"] == "max_tokens"
    assert "200" in error_of(chat(engine, messages=[{"role": "user", "content": "y" * 200}]), 400)["message"]


def test_a_stream_opens_with_the_role_and_ends_with_the_reason():
    got = events(chat(FakeEngine(answer="hey"), stream=True, stream_options={"include_usage": True}))
    assert got.pop() == "[DONE]"
    last = got.pop()
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert [each["choices"][0]["delta"] for each in got] == [
        {"role": "assistant", "content": ""},
        {"content": "h"},
        {"content": "e"},
        {"content": "y"},
    ]
    assert [each["choices"][0]["finish_reason"] for each in got] == [None, None, None, "stop"]
    assert {each["object"] for each in [*got, last]} == {"chat.completion.chunk"}
    assert len({each["id"] for each in [*got, last]}) == 1
    assert {each["usage"] for each in got} == {None}


def test_several_answers_share_a_stream():
    got = events(chat(FakeEngine(answer="hey"), stream=True, n=3))[:-1]
    said, roles = dict.fromkeys(range(3), ""), []
    for each in got:
        choice = each["choices"][0]
        said[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] if "role" in choice["delta"] else []
    assert said == dict.fromkeys(range(3), "hey")
    assert roles == [0, 1, 2]
    assert [each["choices"][0]["index"] for each in got[-3:]] == [0, 1, 2]  # interleaved, not one after the other


def test_several_answers_at_once():
    answer = chat(FakeEngine(num_cached_tokens=7), n=2).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["hello", "hello"]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    assert answer["usage"]["completion_tokens"] == 10


def test_logprobs_have_openais_shape():
    choice = chat(FakeEngine(answer="b"), logprobs=True, top_logprobs=2).json()["choices"][0]
    assert choice["logprobs"]["content"] == [
        {
            "token": "b",
            "logprob": -1.5,
            "bytes": [98],
            "top_logprobs": [
                {"token": "c", "logprob": -0.5, "bytes": [99]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        }
    ]
    choice = chat(FakeEngine(answer="b"), logprobs=True).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("hold_text", [False, True])
def test_streamed_logprobs_join_to_the_whole_ones(hold_text):
    whole = chat(FakeEngine(), logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    got = events(chat(FakeEngine(hold_text=hold_text), logprobs=True, top_logprobs=3, stream=True))
    parts = [each["choices"][0]["logprobs"] for each in got[:-1]]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_steps_without_text_send_nothing():
    got = events(chat(FakeEngine(hold_text=True), stream=True))
    assert [each["choices"][0]["delta"].get("content") for each in got[:-1]] == ["", "hello"]


def test_prompt_logprobs_in_vllms_form():
    answer = chat(FakeEngine(), prompt_logprobs=1).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
