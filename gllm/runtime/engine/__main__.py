"""`python -m gllm.runtime.engine`: the engine process. Started by a front end, it starts the workers."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from gllm.core import PlanError, StallError
from gllm.policy import parse_policy
from gllm.runtime import process
from gllm.runtime.channels import Addresses, router, socket, watch_parent
from gllm.runtime.engine.loop import EngineLoop
from gllm.runtime.engine.recording import Recording
from gllm.runtime.engine.task import EngineTask
from gllm.runtime.errors import EngineDeadError, StartError
from gllm.runtime.messages import (
    Allocate,
    Allocated,
    Dead,
    Finish,
    Loading,
    Ping,
    Ready,
    Record,
    StageTime,
    StepDone,
    Stop,
    WorkerFailed,
    WorkerLoading,
    WorkerReady,
    decode_command,
    decode_report,
    encode,
)
from gllm.runtime.worker.task import WorkerTask

if TYPE_CHECKING:
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.messages import Notice, Order, Report, Step

_R = TypeVar("_R", WorkerReady, Allocated)

_POLL_MS = 200  # how often the workers' launcher is looked after
_LAST_WORDS_S = 0.5  # for a worker that died, to say why
_GOODBYE_S = 5.0
_DOUBT_S = 1.0


class Workers:
    """The engine's side of all workers."""

    def __init__(
        self, config: RuntimeConfig, context: zmq.Context[zmq.Socket[bytes]], address: str, folder: str
    ) -> None:
        self.num = config.num_workers
        self._doubt_until = 0.0  # till when every worker is asked whether it is there
        self.router, self.monitor = router(context, address)
        self._names = [str(rank).encode() for rank in range(self.num)]
        where = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._launcher = process.start("gllm.runtime.worker", WorkerTask(config, where, folder))

    def dispatch(self, step: Step) -> None:
        """Send a step to every worker."""
        self.order(step)

    def order(self, order: Order) -> None:
        """Tell every worker the same."""
        message = encode(order)
        for name in self._names:
            try:
                self.router.send_multipart((name, message))
            except zmq.ZMQError:
                raise self._death() from None

    def receive(self) -> Report:
        """The next report.

        Raises:
            EngineDeadError: It says that a worker failed.
        """
        report: Report = decode_report(self.router.recv_multipart()[1])
        if isinstance(report, WorkerFailed):
            raise self._death(report)
        return report

    def check(self, *, disconnected: bool) -> None:
        """Raise `EngineDeadError` if a worker or the process that watches them is gone."""
        if disconnected:  # perhaps only a stranger who had knocked at our port
            recv_monitor_message(self.monitor)
            self._doubt_until = time.monotonic() + _DOUBT_S
        is_gone = time.monotonic() < self._doubt_until and not all(map(self._reaches, self._names))
        if is_gone or self._launcher.poll() is not None:
            raise self._death()

    def _death(self, said: WorkerFailed | None = None) -> Exception:
        """What to raise when a worker has said that it failed, or something has gone without a word."""
        words = self._last_words(said)
        return (StartError if words.usage else EngineDeadError)(words.reason)

    def _last_words(self, said: WorkerFailed | None) -> WorkerFailed:
        """Who died first. A worker that fails may only have lost a neighbour; the launcher knows, of its own node."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while not _is_sure(said) and (left_ms := int(1000 * (deadline - time.monotonic()))) > 0:
            if self.router.poll(left_ms):
                report = decode_report(self.router.recv_multipart()[1])
                if isinstance(report, WorkerFailed) and (said is None or _is_sure(report)):
                    said = report
        if said is not None and _is_sure(said):
            return said
        if self._launcher.poll() is not None:
            return WorkerFailed(-1, f"the workers' launcher {process.how(self._launcher.returncode)}")
        gone = next((name.decode() for name in self._names if not self._reaches(name)), None)
        return said or WorkerFailed(-1, "a worker died") if gone is None else WorkerFailed(-1, f"worker {gone} died")

    def _reaches(self, name: bytes) -> bool:
        """Whether a worker is still there."""
        try:
            self.router.send_multipart((name, encode(Ping())))
        except zmq.ZMQError:
            return False
        return True

    def end(self) -> None:
        """Let the workers end, or make them."""
        try:
            self.order(Stop())
        except EngineDeadError:
            self._launcher.kill()
        process.end(self._launcher, _GOODBYE_S)

    def kill(self) -> None:
        """End the workers now."""
        self._launcher.kill()
        self._launcher.wait()


def _is_sure(said: WorkerFailed | None) -> bool:
    return said is not None and (said.rank < 0 or said.usage)


class Server:
    """Sockets around an `EngineLoop`."""

    def __init__(self, task: EngineTask) -> None:
        self._config, self._folder = task.config, task.folder
        context = zmq.Context()
        nodes = task.config.nodes
        addresses = Addresses.within(Path(task.folder), nodes.host if nodes.num_nodes > 1 else "")
        self._commands = socket(context, zmq.PULL, bind=addresses.commands)
        self._notices = socket(context, zmq.PUSH, bind=addresses.notices)
        self._notices.linger = 2000
        self.workers = Workers(task.config, context, addresses.workers, task.folder)
        self._recording: Recording | None = None
        self._is_over = False

    def tell(self, notice: Notice) -> None:
        """Send the front end a notice."""
        self._notices.send(encode(notice))

    def serve(self) -> None:
        """Start the workers, then take turns until the front end has had enough."""
        loop = self._start()
        gc.collect()
        gc.freeze()
        start = time.monotonic()
        poller = zmq.Poller()
        for sock in (self._commands, self.workers.router, self.workers.monitor):
            poller.register(sock, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(self._patience_ms(loop)))
            self.workers.check(disconnected=self.workers.monitor in ready)
            if self.workers.router in ready:
                self._take_reports(loop)
            if self._commands in ready and not self._take_commands(loop):
                break
            loop.run()
        self._finish(loop, time.monotonic() - start)

    @staticmethod
    def _patience_ms(loop: EngineLoop) -> int:
        due_ms = loop.timeout_ms()
        return _POLL_MS if due_ms is None else min(due_ms, _POLL_MS)

    def _take_reports(self, loop: EngineLoop) -> None:
        while self.workers.router.poll(0):
            report = self.workers.receive()
            if isinstance(report, StepDone):
                loop.done(report)
                return  # one result, one turn: its successors can wait, the next step cannot
            if isinstance(report, StageTime):
                loop.stage_time(report)

    def _take_commands(self, loop: EngineLoop) -> bool:
        """Whether to go on."""
        while self._commands.poll(0):
            command = decode_command(self._commands.recv())
            if isinstance(command, Finish):
                return False
            loop.command(command)
        return True

    def _finish(self, loop: EngineLoop, wall_s: float) -> None:
        self._is_over = True
        recording = self._recording
        if recording is not None:
            # The last stage is not always the last to tell its time, and a step planned ahead may be nobody's.
            while not (loop.is_idle and recording.is_whole):
                if self.workers.router.poll(_POLL_MS):
                    self._take_reports(loop)
                    loop.run()
                self.workers.check(disconnected=bool(self.workers.monitor.poll(0)))
            self.tell(Record(recording.pack(wall_s)))
        else:
            self.tell(Record(None))
        self.workers.end()

    def _start(self) -> EngineLoop:
        config = self._config
        model = config.check()
        policy = parse_policy(config.policy)
        readies = self._gather(WorkerReady, "workers have loaded the model")
        num_blocks = config.num_blocks or min(ready.num_blocks for ready in readies)
        limits = config.limits(num_blocks)
        self.workers.order(Allocate(num_blocks))
        self._gather(Allocated, "workers have made the cache")
        if config.record is not None:
            self._recording = Recording(limits, config.record)
        loop = EngineLoop(policy, limits, model.eos_token_ids, self.workers, self.tell, self._recording)
        self.tell(Ready(num_blocks, limits.max_tokens_per_sequence, readies[0].device))
        return loop

    def _gather(self, kind: type[_R], what: str) -> list[_R]:
        """One report of this kind from every worker, in order of rank."""
        found: dict[int, _R] = {}
        while len(found) < self.workers.num:
            if self.workers.router.poll(_POLL_MS):
                report = self.workers.receive()
                if isinstance(report, WorkerLoading):
                    what_now = f"worker {report.rank} has read {report.num_read} of {report.num_tensors} tensors"
                    self.tell(Loading(what_now))
                if isinstance(report, kind):
                    found[report.rank] = report
                    self.tell(Loading(f"{len(found)} of {self.workers.num} {what}"))
            self.workers.check(disconnected=bool(self.workers.monitor.poll(0)))
        return [found[rank] for rank in sorted(found)]

    def vanish(self) -> None:
        """End at once: nobody listens any more. The workers follow, when they see that their launcher is gone."""
        if self._is_over:
            return  # the workers are being told
        self.discard()
        self.workers.kill()
        shutil.rmtree(self._folder, ignore_errors=True)  # who made it cannot
        os._exit(1)

    def discard(self) -> None:
        """Leave no half-written record."""
        if self._recording is not None:
            self._recording.discard()


def explain(error: Exception) -> Dead:
    """What the front end should say."""
    if os.environ.get("GLLM_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, (StartError, EngineDeadError, PlanError, StallError, ValueError)):
        return Dead(str(error), isinstance(error, ValueError))
    return Dead(f"the engine failed: {type(error).__name__}: {error} (GLLM_TRACEBACK=1 shows where)")


def main() -> int:
    """Serve; the exit status tells whether that ended well."""
    task = process.read_task(EngineTask)
    server = Server(task)
    watch_parent(server.vanish)
    try:
        server.serve()
    except Exception as error:  # noqa: BLE001 - whatever it is, the front end must hear of it
        server.discard()
        server.tell(explain(error))
        server.workers.kill()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
