"""`python -m gllm.runtime.engine`: the engine process. Started by a front end, it starts the workers."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from gllm.core import PlanError, StallError
from gllm.policy import parse_policy
from gllm.runtime import process
from gllm.runtime.channels import Addresses, socket, watch_parent
from gllm.runtime.engine.loop import EngineLoop
from gllm.runtime.engine.recording import Recording
from gllm.runtime.engine.task import EngineTask
from gllm.runtime.engine.workers import POLL_MS, Workers
from gllm.runtime.errors import EngineDeadError, StartError
from gllm.runtime.messages import Dead, Finish, Loading, Ready, Record, decode_command, encode

if TYPE_CHECKING:
    from gllm.runtime.messages import Notice


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
        goes_on = True
        while goes_on:
            ready = dict(poller.poll(self._patience_ms(loop)))
            self.workers.check(disconnected=self.workers.monitor in ready)
            if self.workers.router in ready:
                self.workers.deliver(loop)
            if self._commands in ready:
                goes_on = self._take_commands(loop)
            loop.run()  # before the end, too: a result that came with the order to end is nobody's otherwise
        self._finish(loop, time.monotonic() - start)

    @staticmethod
    def _patience_ms(loop: EngineLoop) -> int:
        due_ms = loop.timeout_ms()
        return POLL_MS if due_ms is None else min(due_ms, POLL_MS)

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
                self.workers.attend(loop)
            self.tell(Record(recording.pack(wall_s)))
        else:
            self.tell(Record(None))
        self.workers.end()

    def _start(self) -> EngineLoop:
        config = self._config
        model = config.check()
        limits, device = self.workers.load(lambda text: self.tell(Loading(text)))
        if config.record is not None:
            self._recording = Recording(limits, config.record)
        policy = parse_policy(config.policy)
        loop = EngineLoop(policy, limits, model.eos_token_ids, self.workers, self.tell, self._recording)
        self.tell(Ready(limits.num_blocks, limits.max_tokens_per_sequence, device))
        return loop

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
