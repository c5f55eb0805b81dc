"""What is not generation: models, the API key, health, metrics, and what clients are told when things break."""

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runtime.fake_engine import FakeEngine, ask, complete, error_of, events

from gllm.runtime.messages import EngineStats
from gllm.runtime.server.app import create_app

PATHS = ["/v1/completions", "/v1/chat/completions"]


def body_of(path, **more):
    return ({"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}) | more


# Models


def test_every_served_name_is_a_model():
    engine = FakeEngine()
    listed = ask(engine, "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["fake", "alias/fake"]
    card = {"object": "model", "created": 1_700_000_000, "owned_by": "gllm", "root": "models/fake"}
    assert listed["data"][0] == card | {"id": "fake", "max_model_len": 200}
    assert ask(engine, "/v1/models/alias/fake").json() == listed["data"][1]
    assert error_of(ask(engine, "/v1/models/other"), 404)["param"] == "model"


def test_a_model_without_other_names_has_its_own():
    assert ask(FakeEngine(served_names=()), "/v1/models").json()["data"][0]["id"] == "models/fake"


# The API key


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer sécret"])
@pytest.mark.parametrize("path", ["/v1/models", *PATHS])
def test_v1_asks_for_the_key(path, header):
    engine = FakeEngine()
    headers = {} if header is None else {"Authorization": header.encode()}
    body = None if path == "/v1/models" else body_of(path)
    response = ask(engine, path, body, headers=headers, app=create_app(engine, api_key="secret"))
    assert error_of(response, 401)["type"] == "AuthenticationError"
    assert engine.calls == []


@pytest.mark.parametrize("path", ["/v1/models", *PATHS])
def test_the_key_opens(path):
    engine = FakeEngine()
    body = None if path == "/v1/models" else body_of(path)
    headers = {"Authorization": "bearer secret"}
    assert ask(engine, path, body, headers=headers, app=create_app(engine, api_key="secret")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics"])
def test_who_watches_needs_no_key(path):
    engine = FakeEngine()
    assert ask(engine, path, app=create_app(engine, api_key="secret")).status_code == 200


# Health


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert ask(FakeEngine(), "/version").json() == {"version": version("gllm")}


def test_a_dead_engine_is_said_everywhere():
    engine = FakeEngine(failure="worker 1 was killed")
    assert "worker 1 was killed" in error_of(ask(engine, "/health"), 503)["message"]
    assert "worker 1 was killed" in error_of(ask(engine, "/ping"), 503)["message"]
    for path in PATHS:
        assert "worker 1 was killed" in error_of(ask(engine, path, body_of(path)), 503)["message"]
        assert error_of(ask(engine, path, body_of(path, stream=True)), 503)["type"] == "ServiceUnavailableError"
    assert ask(engine, "/metrics").status_code == 200
    assert engine.calls == []


def test_while_the_server_drains_it_takes_nothing_new():
    engine = FakeEngine()
    app = create_app(engine)
    app.state.service.door.closed = True
    response = ask(engine, "/v1/completions", body_of("/v1/completions"), app=app)
    assert "shutting down" in error_of(response, 503)["message"]
    assert response.headers["connection"] == "close"
    error_of(ask(engine, "/health", app=app), 503)
    assert ask(engine, "/metrics", app=app).status_code == 200


# Failures on the way


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_dies_fails_a_whole_answer(path, step):
    engine = FakeEngine(die_at=step)
    assert "worker 1 was killed" in error_of(ask(engine, path, body_of(path)), 500)["message"]
    assert engine.num_running == 0


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_dies_before_a_streams_headers(path):
    assert "worker 1" in error_of(ask(FakeEngine(die_at=0), path, body_of(path, stream=True)), 503)["message"]


@pytest.mark.parametrize(("fault", "says"), [({"die_at": 3}, "worker 1"), ({"fail_at": 3}, "this answer")])
@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_breaks_ends_with_an_error(path, fault, says):
    engine = FakeEngine(**fault)
    got = events(ask(engine, path, body_of(path, stream=True)))
    assert got[-1].keys() == {"error"}
    assert says in got[-1]["error"]["message"]
    assert got[-1]["error"]["code"] == 500
    assert all("error" not in each for each in got[:-1])
    assert engine.num_running == 0


def test_a_failed_answer_fails_the_whole():
    assert "this answer" in error_of(complete(FakeEngine(fail_at=3)), 500)["message"]


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_answer_without_an_end_is_a_failure(prompt):
    assert "without a reason" in error_of(complete(FakeEngine(end_at=2), prompt=prompt), 500)["message"]
    assert "error" in events(complete(FakeEngine(end_at=2), prompt=prompt, stream=True))[-1]


def test_our_own_bug_is_ours(caplog):
    class Broken(FakeEngine):
        async def _steps(self, prompt, params):
            async for delta in super()._steps(prompt, params):
                yield delta
                raise ValueError("a bug")

    error = error_of(complete(Broken()), 500)
    assert "ValueError" in error["message"]
    assert "a bug" not in error["message"]
    assert "ValueError" in events(complete(Broken(), stream=True))[-1]["error"]["message"]
    assert "a bug" in caplog.text


def test_one_failure_aborts_the_other_prompts():
    engine = FakeEngine(die_at=2, delay_s=0.001)
    error_of(complete(engine, prompt=["a", "b", "c"]), 500)
    assert engine.num_running == 0
    assert engine.num_aborted == 3


# Clients that go away


async def visit(engine, path, body, leave, app=None, *, is_deaf=False):
    """One request whose client reads until `leave(what it has read)`, then hangs up; all that it read.

    Whoever is deaf has closed its end before anything is sent.
    """
    gone, read, asked = asyncio.Event(), [], [{"type": "http.request", "body": json.dumps(body).encode()}]
    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}, "query_string": b"", "http_version": "1.1"}

    async def receive():
        if asked:
            return asked.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        read.append(message)
        if is_deaf:
            raise OSError("the connection is closed")

    visiting = asyncio.create_task((app or create_app(engine))(scope, receive, send))
    while not leave(read):  # noqa: ASYNC110 - nothing tells us when the engine is busy
        await asyncio.sleep(0.001)
    gone.set()
    await asyncio.wait_for(visiting, 5)
    assert engine.num_running == 0, "work goes on without a client"
    return read


def is_busy(engine):
    return lambda _: engine.num_running > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_work_ends_when_the_client_goes_before_the_first_token(path, stream):
    engine = FakeEngine(delay_s=10)
    asyncio.run(visit(engine, path, body_of(path, stream=stream), is_busy(engine)))
    assert engine.num_aborted == 1


def test_every_prompts_work_ends():
    engine = FakeEngine(delay_s=10)
    asyncio.run(visit(engine, PATHS[0], {"prompt": ["a", "b", "c"]}, lambda _: engine.num_running == 3))
    assert engine.num_aborted == 3


@pytest.mark.parametrize("path", PATHS)
def test_work_ends_when_the_client_goes_in_the_middle_of_a_stream(path):
    engine = FakeEngine(answer="x" * 100, delay_s=0.005)
    read = asyncio.run(visit(engine, path, body_of(path, stream=True), lambda read: len(read) > 4))
    assert read[0]["status"] == 200
    assert len(read) < 20
    assert engine.num_aborted == 1


@pytest.mark.parametrize("path", PATHS)
def test_work_ends_when_not_even_the_headers_can_be_sent(path):
    engine = FakeEngine(delay_s=0.01)
    read = asyncio.run(visit(engine, path, body_of(path, stream=True), lambda read: len(read) > 0, is_deaf=True))
    assert len(read) == 1
    assert engine.num_aborted == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_answer_that_a_drain_cuts_off(path):
    engine = FakeEngine(delay_s=10)
    app = create_app(engine)

    async def cut_and_visit():
        asyncio.get_running_loop().call_later(0.05, app.state.service.door.cut_off)
        return await visit(engine, path, body_of(path), lambda read: len(read) > 1, app)

    assert asyncio.run(cut_and_visit())[0]["status"] == 503
    assert engine.num_aborted == 1


# Metrics


def scraped(app, engine):
    """Every sample by its name, and by its labels other than the model's."""
    response = ask(engine, "/metrics", app=app)
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "models/fake"
            samples[sample.name, *labels.values()] = sample.value
    return samples


def test_the_engines_numbers():
    numbers = {"num_running": 3, "num_waiting": 4, "kv_usage": 0.25, "num_preemptions": 5}
    engine = FakeEngine(numbers=EngineStats(**numbers, prefix_queries=60, prefix_hits=7))
    samples = scraped(create_app(engine), engine)
    assert samples[("gllm_num_requests_running",)] == 3
    assert samples[("gllm_num_requests_waiting",)] == 4
    assert samples[("gllm_kv_cache_usage_perc",)] == 0.25
    assert samples[("gllm_num_preemptions_total",)] == 5
    assert samples[("gllm_prefix_cache_queries_total",)] == 60
    assert samples[("gllm_prefix_cache_hits_total",)] == 7


def test_what_the_front_end_measures():
    engine = FakeEngine(answer="hello", delay_s=0.02)
    app = create_app(engine)
    ask(engine, PATHS[0], {"prompt": ["abc", "de"]}, app=app)
    ask(engine, PATHS[1], body_of(PATHS[1], max_tokens=3, stream=True), app=app)
    samples = scraped(app, engine)
    assert samples[("gllm_prompt_tokens_total",)] == 5 + 21
    assert samples[("gllm_generation_tokens_total",)] == 5 + 5 + 3
    assert samples[("gllm_request_success_total", "stop")] == 2
    assert samples[("gllm_request_success_total", "length")] == 1
    assert samples[("gllm_request_prompt_tokens_sum",)] == 26
    assert samples[("gllm_request_generation_tokens_sum",)] == 13
    assert samples[("gllm_time_to_first_token_seconds_count",)] == 3
    assert samples[("gllm_time_to_first_token_seconds_sum",)] > 3 * 0.02
    assert samples[("gllm_inter_token_latency_seconds_count",)] == 4 + 4 + 2
    assert samples[("gllm_request_time_per_output_token_seconds_count",)] == 3
    assert samples[("gllm_request_time_per_output_token_seconds_sum",)] > 3 * 0.019
    assert samples[("gllm_e2e_request_latency_seconds_sum",)] > 13 * 0.019


def test_tokens_that_come_together_share_their_time():
    engine = FakeEngine(answer="abcdef", num_a_delta=3, delay_s=0.03)
    app = create_app(engine)
    ask(engine, PATHS[0], {"prompt": "a"}, app=app)
    samples = scraped(app, engine)
    assert samples[("gllm_inter_token_latency_seconds_count",)] == 3
    mean_s = samples[("gllm_request_time_per_output_token_seconds_sum",)]
    assert samples[("gllm_inter_token_latency_seconds_sum",)] == pytest.approx(5 * mean_s)


def test_two_applications_count_apart():
    engine = FakeEngine()
    first, second = create_app(engine), create_app(engine)
    ask(engine, PATHS[0], {"prompt": "a"}, app=first)
    assert scraped(first, engine)[("gllm_generation_tokens_total",)] == 5
    assert scraped(second, engine)[("gllm_generation_tokens_total",)] == 0


def test_an_aborted_request_is_no_success():
    engine = FakeEngine(answer="x" * 100, delay_s=0.005)
    app = create_app(engine)
    asyncio.run(visit(engine, PATHS[0], {"prompt": "a", "stream": True}, lambda read: len(read) > 4, app))
    samples = scraped(app, engine)
    assert 0 < samples[("gllm_generation_tokens_total",)] < 100
    assert samples[("gllm_e2e_request_latency_seconds_count",)] == 0
    assert not any(name == "gllm_request_success_total" for name, *_ in samples)
