"""`python -m gllm.runtime.worker`: launches this node's workers through torchrun's machinery, and watches over them.

torch is imported once; the workers are forked from here, which makes their start quick.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import zmq
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gllm.runtime import process
from gllm.runtime.channels import LAUNCHER, watch_parent, worker_socket
from gllm.runtime.messages import WorkerFailed, encode
from gllm.runtime.worker.task import WorkerTask
from gllm.runtime.worker.worker import work

_WATCH_S = 0.1


def launch(task: WorkerTask) -> str | None:
    """Run this node's workers until they end; return why they failed, if they did."""
    config, nodes = task.config, task.config.nodes
    several = nodes.num_nodes > 1
    launcher = LaunchConfig(
        min_nodes=nodes.num_nodes,
        max_nodes=nodes.num_nodes,
        nproc_per_node=config.num_local_workers,
        run_id="gllm" if several else uuid.uuid4().hex,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=nodes.endpoint if several else "localhost:0",
        rdzv_configs={"rank": nodes.rank} if several else {},
        max_restarts=0,  # the cache is lost with a worker: there is nothing to restart into
        monitor_interval=_WATCH_S,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=task.folder),
    )
    try:
        elastic_launch(launcher, work)(config, task.address)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return f"worker {rank} {how(failure)}"
    except SignalException:
        return "the workers' launcher was told to end"
    return None


def how(failure: ProcessFailure) -> str:
    """In words: how a worker ended."""
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return f"ended with status {failure.exitcode}: {said}"


def main() -> int:
    """Launch, and tell the engine how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # one line says what died, and it is ours
    # torch looks for GPUs before we fork, and must not touch CUDA for that: what is forked could not use it any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    task = process.read_task(WorkerTask)
    watch_parent(lambda: os._exit(0))
    reason = launch(task)
    if reason is None:
        return 0
    if task.address:
        line = worker_socket(zmq.Context(), task.address, LAUNCHER)
        line.send(encode(WorkerFailed(-1, reason)))
        line.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
