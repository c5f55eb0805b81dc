"""The real command as a process of its own: its tree, what it said, what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import httpx

MARK = "GLLM_TEST_TREE"  # in the environment of a command and of whatever it starts, however that was orphaned
DEADLINE_S = 60.0  # for what takes a second or two on an idle machine
SOON_S = 2.0  # what the issue promises
SLACK_S = 1.0  # for a busy machine


def until(condition, timeout_s=DEADLINE_S, what="it"):
    """The first true value of `condition()`; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"{what} never came"
        time.sleep(0.01)
    return value


def free_port():
    """One that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Command:
    """`python -m gllm.runtime ...` in a process group of its own, as a shell would start it."""

    def __init__(self, *args, stdin=subprocess.DEVNULL, site=None, module="gllm.runtime", cwd=None):
        self.folder = Path(tempfile.mkdtemp(prefix="t-"))  # short: sockets' paths may have 107 characters
        self.scratch = self.folder / "tmp"
        self.scratch.mkdir()
        self._mark = uuid.uuid4().hex
        environment = {**os.environ, "TMPDIR": str(self.scratch), MARK: self._mark, "OMP_NUM_THREADS": "1"}
        environment.pop("GLLM_TRACEBACK", None)
        if site is not None:
            environment["PYTHONPATH"] = str(site)
        with (self.folder / "out").open("w") as out, (self.folder / "err").open("w") as err:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module, *map(str, args)],
                stdin=stdin,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
                cwd=cwd,
                text=True,
            )

    @property
    def out(self):
        """Standard output so far."""
        return (self.folder / "out").read_text()

    @property
    def err(self):
        """Standard error so far."""
        return (self.folder / "err").read_text()

    def tree(self):
        """Every process that came of this command and still runs: pid -> (parent, its module)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"{MARK}={self._mark}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    found[int(entry.name)] = (int(parent), words[words.index("-m") + 1] if "-m" in words else "")
        return found

    def pids(self, role):
        """Of the "engine", the "launcher", or the "worker"s in order of their birth, which is that of their ranks."""
        tree = self.tree()
        wanted = "gllm.runtime.engine" if role == "engine" else "gllm.runtime.worker"
        found = [(pid, tree.get(parent, (0, ""))[1]) for pid, (parent, module) in tree.items() if module == wanted]
        is_fork = role == "worker"  # a launcher's workers are forks of it
        return sorted(pid for pid, above in found if (above == wanted) == is_fork)

    def kill(self, role, number=0):
        """kill -9 one of its processes."""
        os.kill(until(lambda: self.pids(role)[number:], what=role)[0], signal.SIGKILL)

    def interrupt(self):
        """What Ctrl-C on a terminal does: the whole group hears of it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self, timeout_s=DEADLINE_S):
        """The exit status, and its lines on standard error without those that tell how it started."""
        status = self.process.wait(timeout_s)
        if status == -signal.SIGINT:  # what Python ends with when Ctrl-C hit code that it ran from a string, as imports
            status = 128 + signal.SIGINT  # do to make dataclasses; a shell shows both alike
        told = ("serving on http://", "cache blocks", "has read", "have loaded the model", "have made the cache")
        return status, [line for line in self.err.splitlines() if not any(each in line for each in told)]

    def left(self, timeout_s=SOON_S + SLACK_S):
        """What outlives the command: processes after `timeout_s`, and files in its temporary folder."""
        deadline_s = time.monotonic() + timeout_s
        while self.tree() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        names = sorted(path.name for path in self.scratch.iterdir())
        return [*self.tree().values(), *(name for name in names if not name.startswith("torchinductor_"))]

    def close(self):
        """Leave nothing, whatever happened."""
        for pid in self.tree():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Serving(Command):
    """`serve` on a free port, begun; `ready` waits for it."""

    def __init__(self, *args, **options):
        super().__init__("serve", "--port", 0, *args, **options)
        self._client = None

    def ready(self):
        """Wait until it says where it serves; then it is asked for its health."""
        until(lambda: "serving on http://" in self.err or self.process.poll() is not None, what="the server")
        assert "serving on http://" in self.err, self.err
        self.url = self.err.partition("serving on ")[2].partition("/v1")[0]
        until(lambda: self.health() == httpx.codes.OK, what="health")
        return self

    def health(self):
        """The status of /health; None where nobody answers any more."""
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=5).status_code
        except httpx.TransportError:
            return None

    def post(self, path="/v1/completions", **body):
        """Any request."""
        return httpx.post(f"{self.url}{path}", json=body, trust_env=False, timeout=DEADLINE_S)

    def complete(self, prompt="abc", **body):
        """A short answer."""
        return self.post(prompt=prompt, **{"max_tokens": 4, "temperature": 0, **body})

    def running(self):
        """How many requests are in the batch, as /metrics tells."""
        return self._gauge("gllm_num_requests_running")

    def waiting(self):
        """How many wait to be admitted."""
        return self._gauge("gllm_num_requests_waiting")

    def _gauge(self, name):
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=5).text
        line = next(line for line in text.splitlines() if line.startswith(name + "{"))
        return int(float(line.rpartition(" ")[2]))


LONG = {"prompt": "abc", "max_tokens": 1500, "min_tokens": 1500, "ignore_eos": True, "temperature": 0}


class InFlight:
    """A request that takes long, asked in a thread; `result` is how it ended and when."""

    def __init__(self, server, *, stream, **body):
        self._url, self._stream, self._body = server.url, stream, {**LONG, **body}
        self.begun, self.ended_s = threading.Event(), None
        self.status = self.text = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self):
        try:
            body = {**self._body, "stream": self._stream}
            options = {"json": body, "trust_env": False, "timeout": DEADLINE_S}
            with httpx.stream("POST", f"{self._url}/v1/completions", **options) as response:
                self.status, parts = response.status_code, []
                for part in response.iter_text():
                    parts.append(part)
                    self.begun.set()
                self.text = "".join(parts)
        except httpx.TransportError as error:
            self.text = f"broken: {type(error).__name__}"
        self.ended_s = time.monotonic()
        self.begun.set()

    def result(self, timeout_s=DEADLINE_S):
        """(status, text); a stream's last event is its text's end."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it hangs"
        return self.status, self.text

    def error(self):
        """The error in OpenAI's shape that ended it, of a stream or not."""
        status, text = self.result()
        if not self._stream:
            return status, json.loads(text)["error"]
        last = text.strip().splitlines()[-1]
        assert last.startswith("data: {"), last
        return status, json.loads(last.removeprefix("data: "))["error"]
