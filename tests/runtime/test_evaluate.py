"""`evaluate` against servers that answer right, wrong, or not at all."""

from __future__ import annotations

import json
import socket
import threading
from argparse import Namespace
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gllm.runtime.default_model.tasks import held_out_cases
from gllm.runtime.evaluate import evaluate, evaluate_command

NUM_CASES = 20
RIGHT = {json.dumps(case.messages): case.answer for case in held_out_cases(NUM_CASES, 0)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        status, text = self.server.answer(body["messages"])
        self.reply(status, {"choices": [{"message": {"role": "assistant", "content": text}}]} if text else {})

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


@contextmanager
def serving(answer, models=("small",)):
    """The base URL of a server, and the bodies that it was sent."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.answer, server.models, server.bodies = answer, models, []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.bodies
        finally:
            server.shutdown()
            thread.join()


def rightly(messages):
    return 200, RIGHT[json.dumps(messages)]


def without_sums(messages):
    status, text = rightly(messages)
    return status, f"{text}." if text.lstrip("-").isdigit() else text


def ask(base_url, **options):
    return evaluate(base_url, **{"num_cases": NUM_CASES, "concurrency": 4, **options})


def arguments(base_url=None, **options):
    defaults = {"model_named": None, "num_cases": NUM_CASES, "case_seed": 0, "concurrency": 4, "threshold": 0.95}
    return Namespace(**{"base_url": base_url, "json": False, "quiet": True, **defaults, **options})


def test_right_answers():
    with serving(rightly) as (url, bodies):
        result = ask(url)
    assert (result["model"], result["num_cases"], result["num_right"], result["accuracy"]) == ("small", 20, 20, 1)
    assert {task: score["num_cases"] for task, score in result["tasks"].items()} == dict.fromkeys(
        ("copy", "sort", "arithmetic", "json"), 5
    )
    assert result["wrong"] == []
    assert len(bodies) == NUM_CASES
    assert all(body["temperature"] == 0 and body["model"] == "small" for body in bodies)


def test_wrong_answers_are_counted_by_task_and_quoted():
    with serving(without_sums) as (url, _):
        result = ask(f"{url}/v1/", model="named")
    assert result["model"] == "named"
    assert result["tasks"]["arithmetic"]["num_right"] == 0
    assert result["tasks"]["json"]["accuracy"] == 1
    assert 0 < len(result["wrong"]) <= 5
    for wrong in result["wrong"]:
        assert wrong["answer"] == f"{wrong['expected']}."


def test_the_hash_of_the_answers_does_not_depend_on_their_order():
    with serving(rightly) as (url, _):
        hashes = {ask(url, concurrency=number)["answers_sha256"] for number in (1, 16)}
    with serving(without_sums) as (url, _):
        other = ask(url)["answers_sha256"]
    assert len(hashes) == 1
    assert other not in hashes


def test_errors_are_wrong_answers():
    with serving(lambda _: (503, "")) as (url, _):
        result = ask(url)
    assert (result["num_right"], result["num_errors"]) == (0, NUM_CASES)
    assert result["wrong"][0]["error"].startswith("503")
    with serving(lambda _: (200, "")) as (url, _):
        result = ask(url)
    assert result["num_errors"] == NUM_CASES
    assert "not a chat completion" in result["wrong"][0]["error"]


def test_no_server_and_no_model_are_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="no server answers there"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ValueError, match="no server answers there"):
        ask("localhost")
    with serving(rightly, models=()) as (url, _), pytest.raises(ValueError, match="names no model"):
        ask(url)


def test_the_command_starts_a_server_and_passes_or_fails(capsys):
    started = []

    @contextmanager
    def start(args):
        with serving(without_sums) as (url, _):
            started.append(args)
            yield url

    assert evaluate_command(arguments(model_named="folder"), start) == 1
    said = capsys.readouterr()
    assert "arithmetic" in said.out
    assert "75.0%" in said.out
    assert "less than --threshold 95.0%" in said.err
    assert evaluate_command(arguments(threshold=0.75), start) == 0
    assert len(started) == 2


def test_the_command_prints_json(capsys):
    with serving(rightly) as (url, _):
        assert evaluate_command(arguments(url, json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert result["accuracy"] == 1
