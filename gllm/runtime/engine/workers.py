"""The engine's side of its workers: starts their launcher, sends orders, hears reports, finds out who died."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from gllm.runtime import process
from gllm.runtime.channels import router
from gllm.runtime.errors import EngineDeadError, StartError
from gllm.runtime.messages import (
    Allocate,
    Allocated,
    Ping,
    StageTime,
    StepDone,
    Stop,
    WorkerFailed,
    WorkerLoading,
    WorkerReady,
    decode_report,
    encode,
)
from gllm.runtime.worker.task import WorkerTask

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.chunk_schedule import ChunkKernel
    from gllm.core import Limits
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.engine.loop import EngineLoop
    from gllm.runtime.messages import Order, Report, Step

_R = TypeVar("_R", WorkerReady, Allocated)

POLL_MS = 200
"""How often the workers' launcher is looked after."""

_LAST_WORDS_S = 1.0  # for a worker that died, to say why
_LAUNCHERS_WORD_S = 3.0
"""More, where one of this node is gone: a busy machine's launcher may need that to see how it ended. Both together are
less than what a worker that has lost a neighbour waits before it ends, for which the launcher would blame it."""

_GOODBYE_S = 5.0
_DOUBT_S = 1.0


class Workers:
    """The engine's side of all workers."""

    def __init__(
        self, config: RuntimeConfig, context: zmq.Context[zmq.Socket[bytes]], address: str, folder: str
    ) -> None:
        self._config = config
        self.chunk_kernel: ChunkKernel | None = None  # once they are loaded
        self._doubt_until = 0.0  # till when every worker is asked whether it is there
        self.router, self.monitor = router(context, address)
        self._names = [str(rank).encode() for rank in range(config.num_workers)]
        where = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._launcher = process.start("gllm.runtime.worker", WorkerTask(config, where, folder))

    def load(self, tell: Callable[[str], None]) -> tuple[Limits, str]:
        """Wait until all workers have the model and their cache; `tell` hears how far they are.

        Returns:
            What the core is to be told, and the device's name.
        """
        readies = self._gather(WorkerReady, "workers have loaded the model", tell)
        num_blocks = self._config.num_blocks or min(ready.num_blocks for ready in readies)
        limits = self._config.limits(num_blocks)
        self.order(Allocate(num_blocks))
        self._gather(Allocated, "workers have made the cache", tell)
        self.chunk_kernel = readies[0].chunk_kernel
        return limits, readies[0].device

    def _gather(self, kind: type[_R], what: str, tell: Callable[[str], None]) -> list[_R]:
        """One report of this kind from every worker, in order of rank."""
        found: dict[int, _R] = {}
        while len(found) < len(self._names):
            if self.router.poll(POLL_MS):
                report = self.receive()
                if isinstance(report, WorkerLoading):
                    tell(f"worker {report.rank} has read {report.num_read} of {report.num_tensors} tensors")
                if isinstance(report, kind):
                    found[report.rank] = report
                    tell(f"{len(found)} of {len(self._names)} {what}")
            self.check(disconnected=bool(self.monitor.poll(0)))
        return [found[rank] for rank in sorted(found)]

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

    def await_report(self) -> Report:
        """The next report, however long it takes; raises `EngineDeadError` when there will be none."""
        while not self.router.poll(POLL_MS):
            self.check(disconnected=bool(self.monitor.poll(0)))
        return self.receive()

    def receive(self) -> Report:
        """The next report.

        Raises:
            EngineDeadError: It says that a worker failed.
        """
        report: Report = decode_report(self.router.recv_multipart()[1])
        if isinstance(report, WorkerFailed):
            raise self._death(report)
        return report

    def deliver(self, loop: EngineLoop) -> None:
        """Hand a loop what has come, up to a step's result."""
        while self.router.poll(0):
            report = self.receive()
            if isinstance(report, StepDone):
                loop.done(report)
                return  # one result, one turn: its successors can wait, the next step cannot
            if isinstance(report, StageTime):
                loop.stage_time(report)

    def attend(self, loop: EngineLoop) -> None:
        """Wait a moment for something to come, and let a loop take its turns with it."""
        if self.router.poll(POLL_MS):
            self.deliver(loop)
            loop.run()
        self.check(disconnected=bool(self.monitor.poll(0)))

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
        said = self._heard(said, _LAST_WORDS_S)
        gone = next((name.decode() for name in self._names if not self._reaches(name)), None)
        if gone is not None and int(gone) < self._config.num_local_workers and self._launcher.poll() is None:
            said = self._heard(said, _LAUNCHERS_WORD_S)
        if said is not None and _is_sure(said):
            return said
        if self._launcher.poll() is not None:
            return WorkerFailed(-1, f"the workers' launcher {process.how(self._launcher.returncode)}")
        return said or WorkerFailed(-1, "a worker died") if gone is None else WorkerFailed(-1, f"worker {gone} died")

    def _heard(self, said: WorkerFailed | None, seconds: float) -> WorkerFailed | None:
        """The first report of a failure within that time, or one that is sure."""
        deadline = time.monotonic() + seconds
        while not _is_sure(said) and (left_ms := int(1000 * (deadline - time.monotonic()))) > 0:
            if self.router.poll(left_ms):
                report = decode_report(self.router.recv_multipart()[1])
                if isinstance(report, WorkerFailed) and (said is None or _is_sure(report)):
                    said = report
        return said

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
