"""A server on a free port: in a thread of this process, or in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from gllm.runtime.server.app import create_app
from gllm.runtime.server.serve import Server, bind

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from gllm.runtime.server.app import create_app
from gllm.runtime.server.serve import bind, serve_app
from runtime.fake_engine import FakeEngine

engine = FakeEngine(answer="x" * 100, tokenizer=None, **eval(sys.argv[1]))
sock = bind("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
sys.exit(serve_app(create_app(engine), sock=sock, **eval(sys.argv[2])))
"""


def wait_for(condition, timeout_s=20.0):
    """Until `condition()` is true; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def in_thread(engine, **options):
    """The port of a server that ends with the block."""
    sock = bind("127.0.0.1", 0)
    server = Server(create_app(engine, **options), drain_timeout_s=2)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield sock.getsockname()[1]
    finally:
        server.drain()
        thread.join(10)
        assert not thread.is_alive()


@contextlib.contextmanager
def in_process(engine=None, **serve):
    """A process that calls `serve_app` and exits as that says, and its port."""
    command = [sys.executable, "-c", PROGRAM, repr(engine or {}), repr(serve)]
    process = subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        port = int(process.stdout.readline())
        wait_for(lambda: status_of(port, "/health") in (200, 503))
        yield process, port
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def status_of(port, path):
    """The HTTP status of a GET; None where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
