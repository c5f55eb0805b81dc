"""When things break: whoever dies, and however, everybody is told soon, in one line, and nothing is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from runtime.servers import LONG, SLACK_S, SOON_S, Command, InFlight, Serving, until

from gllm.runtime import process

PROMPTLY_S = SOON_S + SLACK_S


def break_server(server, kill):
    """Two requests in flight, then `kill(server)`; how long until they were told, their errors, the server's end."""
    flying = [InFlight(server, stream=True), InFlight(server, stream=False)]
    until(lambda: server.running() == 2, what="two running requests")
    assert flying[0].begun.wait(SOON_S)
    start_s = time.monotonic()
    kill(server)
    errors = [each.error() for each in flying]
    assert max(each.ended_s for each in flying) - start_s < PROMPTLY_S
    assert server.health() in (503, None)
    status, lines = server.ended()
    assert time.monotonic() - start_s < PROMPTLY_S + SLACK_S
    assert server.left() == []
    assert (errors[0][0], errors[1][0]) == (200, 500), "the stream's headers were out already"
    assert all(error["type"] == "InternalServerError" and error["code"] == 500 for _, error in errors)
    return [error["message"] for _, error in errors], status, lines


def assert_told(server, kill, pattern):
    """Everybody hears the same, and it matches the pattern."""
    messages, status, lines = break_server(server, kill)
    assert status == 1
    assert len(lines) == 1, lines
    reason = lines[0].removeprefix("gllm: error: ")
    assert re.fullmatch(pattern, reason), reason
    assert messages == [f"the engine died: {reason}"] * 2


@pytest.mark.parametrize(
    ("layout", "role", "number", "pattern"),
    [
        ((), "worker", 0, "worker 0 was killed by SIGKILL"),
        ((), "launcher", 0, "the workers' launcher was killed by SIGKILL"),
        ((), "engine", 0, "the engine process was killed by SIGKILL"),
        (("--tp", 2), "worker", 0, "worker 0 was killed by SIGKILL"),
        (("--pp", 2), "worker", 1, "worker 1 was killed by SIGKILL"),
    ],
)
def test_kill_9(layout, role, number, pattern):
    with Serving(*layout) as server:
        assert_told(server.ready(), lambda server: server.kill(role, number), pattern)


def test_health_says_503_before_the_end():
    with Serving() as server:
        server.ready().kill("worker")
        answers = []
        until(lambda: answers.append(server.health()) or server.process.poll() is not None)
        assert 503 in answers
        assert answers.index(503) < len(answers) - 1


RAISES = """
import os.path
def install():
    import gllm.runtime.worker.stage as stage
    run = stage.Stage.run
    def broken(self, step):
        if self._stage == {stage} and os.path.exists({flag!r}):
            raise {error}
        return run(self, step)
    stage.Stage.run = broken
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "gllm.runtime.worker.worker":
            return None
        sys.meta_path.remove(self)
        install()
        return importlib.util.find_spec(name)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("layout", "stage", "error"),
    [((), 0, "RuntimeError('out of luck')"), (("--pp", 2), 1, "ValueError('out of luck')")],
)
def test_a_worker_that_raises_in_a_step(layout, stage, error, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RAISES.format(stage=stage, error=error, flag=str(tmp_path / "now")))
    with Serving(*layout, site=tmp_path) as server:
        kind = error.partition("(")[0]
        pattern = rf"worker {stage} failed: {kind}: out of luck \(GLLM_TRACEBACK=1 shows where\)"
        assert_told(server.ready(), lambda _: (tmp_path / "now").touch(), pattern)


def test_kill_9_of_the_front_end_leaves_no_process():
    with Serving("--pp", 2) as server:
        flying = InFlight(server.ready(), stream=True)
        until(lambda: server.running() == 1)
        os.kill(server.process.pid, signal.SIGKILL)
        assert flying.result()[1] is not None
        assert server.left() == []
        assert server.ended() == (-signal.SIGKILL, [])


@pytest.mark.parametrize("role", ["worker", "launcher", "engine"])
def test_death_while_loading(role):
    with Serving() as server:
        server.kill(role)
        status, lines = server.ended()
        assert status == 1
        assert len(lines) == 1, lines
        assert "was killed by SIGKILL" in lines[0]
        assert server.left() == []


def test_death_before_it_has_heard_what_to_do(monkeypatch):
    """A child may die between its birth and its task."""
    monkeypatch.setattr(process.subprocess, "Popen", Stillborn)
    child = process.start("gllm.runtime.engine", {})
    assert (child.poll(), process.end(child, 1)) == (-signal.SIGKILL, -signal.SIGKILL)


class Stillborn(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kill()
        self.wait()


SLOW_FORKS = """
import sys, time
def note(event):
    with open({log!r}, "a") as log:
        log.write(event + chr(10))
if "gllm.runtime.worker" in sys.orig_argv:
    import torch.distributed
    from multiprocessing.process import BaseProcess
    start, meet = BaseProcess.start, torch.distributed.init_process_group
    def slowly(self):
        note("forks")  # before it: a child may be quicker than its parent
        start(self)
        time.sleep(0.5)
    def noted(*args, **options):
        note("meets")
        return meet(*args, **options)
    BaseProcess.start, torch.distributed.init_process_group = slowly, noted
"""


def test_no_worker_calls_anybody_before_all_are_forked(tmp_path):
    """A fork made while the store's thread resolves a caller's name can hang for good in libc."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_FORKS.format(log=str(tmp_path / "log")))
    with Serving("--pp", 3, site=tmp_path) as server:
        server.ready()
    assert (tmp_path / "log").read_text().split() == ["forks"] * 3 + ["meets"] * 3


def test_a_worker_whose_launcher_died_at_once_ends():
    orphan = "import time; from gllm.runtime.worker.worker import end_with_parent; end_with_parent(0); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", orphan], timeout=50, check=False).returncode == 1  # noqa: S603


def test_a_launcher_that_cannot_start(tmp_path):
    broken = "import sys\nif 'gllm.runtime.worker' in sys.orig_argv: import os; os._exit(7)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    with Serving(site=tmp_path) as server:
        assert server.ended() == (1, ["gllm: error: the workers' launcher ended with status 7"])
        assert server.left() == []


def test_offline_a_dead_worker_ends_the_command():
    prompts = ["abc"] * 8
    with Command("generate", "--max-tokens", 2000, "--min-p", 0, "--quiet", *prompts) as command:
        command.kill("worker")
        assert command.ended() == (1, ["gllm: error: worker 0 was killed by SIGKILL"])
        assert command.out == ""
        assert command.left() == []


def test_sigterm_drains():
    with Serving() as server:
        flying = InFlight(server.ready(), stream=True)
        until(lambda: server.running() == 1)
        server.process.terminate()
        until(lambda: server.health() == httpx.codes.SERVICE_UNAVAILABLE)
        refused = server.complete()
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        status, text = flying.result()
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        assert server.ended() == (0, [])
        assert server.left() == []


@pytest.mark.parametrize("by", ["terminal", "pkill"])
def test_ctrl_c_drains(by):
    """So does an interrupt of every process by itself, the engine's and the workers' too."""
    with Serving("--pp", 2) as server:
        flying = InFlight(server.ready(), stream=False)
        until(lambda: server.running() == 1)
        if by == "terminal":
            server.interrupt()
        else:
            for pid in server.tree():
                os.kill(pid, signal.SIGINT)
        status, text = flying.result()
        assert status == 200
        assert json.loads(text)["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert server.ended() == (0, [])
        assert server.left() == []


def test_a_second_ctrl_c_ends_at_once():
    with Serving() as server:
        flying = InFlight(server.ready(), stream=True, max_tokens=2000, min_tokens=2000)
        until(lambda: server.running() == 1)
        server.interrupt()
        until(lambda: server.health() == httpx.codes.SERVICE_UNAVAILABLE)
        start_s = time.monotonic()
        server.interrupt()
        _, error = flying.error()
        assert "shut down" in error["message"]
        assert server.ended()[1] == []
        assert time.monotonic() - start_s < PROMPTLY_S
        assert server.left() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_loading(how):
    with Serving() as server:
        until(lambda: server.pids("launcher"))
        os.killpg(server.process.pid, how) if how == signal.SIGINT else server.process.send_signal(how)
        status, lines = server.ended()
        assert (status, lines) == {signal.SIGINT: (130, ["gllm: interrupted"]), signal.SIGTERM: (143, [])}[how]
        assert server.left() == []
