"""The server over TCP: the official client, clients that hang up, the drain, and the exit status."""

import json
import signal
import socket

import openai
import pytest
from runtime.fake_engine import FakeEngine
from runtime.served import in_process, in_thread, status_of, wait_for

from gllm.runtime.server.serve import bind, serve_app

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(num_cached_tokens=2)
    with in_thread(engine, api_key="secret") as port:
        yield engine, port


@pytest.fixture
def client(server):
    base_url = f"http://127.0.0.1:{server[1]}/v1"
    with openai.OpenAI(base_url=base_url, api_key="secret", max_retries=0, timeout=10) as client:
        yield client


# The official client


def test_the_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["fake", "alias/fake"]
    assert client.models.retrieve("fake").id == "fake"


def test_the_client_completes(client):
    answer = client.completions.create(model="fake", prompt="hi", logprobs=2, echo=True)
    assert answer.choices[0].text == "hihello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert answer.choices[0].logprobs.text_offset == list(range(7))
    assert answer.usage.total_tokens == 7
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_the_client_streams_a_completion(client):
    chunks = list(client.completions.create(model="fake", prompt="hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"


def test_the_client_chats(client):
    answer = client.chat.completions.create(model="fake", messages=USER, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
    assert answer.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.5
    history = [*USER, answer.choices[0].message, *USER]
    assert client.chat.completions.create(model="fake", messages=history).choices[0].message.content == "hello"
    history[1] = answer.choices[0].message.model_dump()
    assert client.chat.completions.create(model="fake", messages=history).choices[0].message.content == "hello"


def test_the_client_streams_a_chat(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(model="fake", messages=USER, stream=True, stream_options=options)
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == 5


def test_the_client_helper_gathers_a_stream(client):
    with client.chat.completions.stream(model="fake", messages=USER) as stream:
        assert stream.get_final_completion().choices[0].message.content == "hello"


def test_extra_options_go_by_the_clients_extra_body(client, server):
    client.completions.create(model="fake", prompt="hi", extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True})
    params = server[0].calls[-1][1]
    assert (params.top_k, params.min_p, params.ignore_eos) == (5, 0.1, True)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 1000}),
        (openai.BadRequestError, {"stream": True, "max_tokens": 1000}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, {"extra_body": {"nonsense": 1}}),
        (openai.NotFoundError, {"model": "other"}),
    ],
)
def test_the_client_raises_its_own_errors(client, error, options):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**({"model": "fake", "messages": USER} | options))
    assert raised.value.body["message"]
    assert raised.value.body["code"] == raised.value.status_code
    assert client.completions.create(model="fake", prompt="hi").choices[0].text == "hello"


def test_a_wrong_key(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()


def test_the_client_hears_of_a_death():
    engine = FakeEngine(die_at=2)
    with in_thread(engine) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=10) as client:
            stream = client.chat.completions.create(model="fake", messages=USER, stream=True)
            with pytest.raises(openai.APIError, match="worker 1 was killed"):
                list(stream)
            with pytest.raises(openai.InternalServerError) as raised:
                client.chat.completions.create(model="fake", messages=USER)
            assert raised.value.status_code == 503


# Clients that hang up


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay_s", [0.02, 30])
def test_work_ends_when_a_client_hangs_up(stream, delay_s):
    engine = FakeEngine(answer="x" * 100, delay_s=delay_s)
    body = json.dumps({"prompt": "hi", "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with in_thread(engine) as port:
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_for(lambda: engine.num_running)
            if stream and delay_s < 1:
                assert caller.recv(10).startswith(b"HTTP/1.1 2")
            assert engine.num_aborted == 0
        wait_for(lambda: engine.num_aborted == 1, timeout_s=1)
        assert engine.num_running == 0


# The port


def test_a_taken_port_is_said_before_anything_else():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=f"^port {port} on 127.0.0.1 is taken; choose another with --port$"):
            bind("127.0.0.1", port)


def test_a_port_taken_meanwhile_is_said_as_well():
    late = bind("127.0.0.1", 0)
    port = late.getsockname()[1]
    with bind("127.0.0.1", port) as quick:
        quick.listen()
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is taken"):
            serve_app(None, sock=late)


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [("nowhere.invalid", 0, "--host nowhere.invalid"), ("192.0.2.1", 0, "--host 192.0.2.1"), ("::1", 70000, "65535")],
)
def test_an_address_that_cannot_be_had(host, port, says):
    with pytest.raises(ValueError, match=says):
        bind(host, port)


# The end


def open_stream(port, **more):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=20)
    stream = client.completions.create(model="fake", prompt=[1, 2], stream=True, **({"max_tokens": 30} | more))
    return stream, next(stream).choices[0].text


def test_sigterm_drains():
    with in_process({"delay_s": 0.03}) as (process, port):
        stream, text = open_stream(port)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: status_of(port, "/health") == 503)
        assert status_of(port, "/v1/models") == 503
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "x" * 30
        assert process.wait(20) == 0
    assert status_of(port, "/health") is None


def test_an_idle_server_ends_at_once():
    with in_process() as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_drain_has_an_end():
    with in_process({"delay_s": 0.05}, drain_timeout_s=0.3) as (process, port):
        stream, _ = open_stream(port, max_tokens=100)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shut down before this answer was complete"):
            list(stream)
        assert process.wait(20) == 0


def test_a_second_signal_ends_it_now():
    with in_process({"delay_s": 0.1}) as (process, port):
        stream, _ = open_stream(port, max_tokens=100)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: status_of(port, "/health") == 503)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shut down before this answer was complete"):
            list(stream)
        assert process.wait(20) == 0


def test_a_dead_engine_ends_the_server_with_a_status():
    with in_process({"delay_s": 0.01, "die_at": 3}, linger_s=2) as (process, port):
        stream, _ = open_stream(port)
        with pytest.raises(openai.APIError, match="worker 1 was killed"):
            list(stream)
        assert status_of(port, "/health") == 503
        assert process.wait(20) == 1
