"""`python -m gllm.runtime.worker`: launches this node's workers through torchrun's machinery, and watches over them.

torch is imported once; the workers are forked from here, which makes their start quick.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import uuid
from typing import Any

import zmq
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gllm.console.terminal import warn
from gllm.runtime import process
from gllm.runtime.channels import ENGINE_GONE, LAUNCHER, watch_parent, worker_socket
from gllm.runtime.errors import StartError
from gllm.runtime.messages import WorkerFailed, encode
from gllm.runtime.worker.compile_ahead import compile_ahead
from gllm.runtime.worker.task import WorkerTask
from gllm.runtime.worker.worker import check_devices, work

_WATCH_S = 0.1


def launch(task: WorkerTask) -> WorkerFailed | None:
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
        signals_to_handle="SIGTERM",
        logs_specs=DefaultLogsSpecs(log_dir=task.folder),
    )
    # While there are forks to come, no worker may look anybody up: the store's thread then resolves the worker's name
    # under a lock of libc's, and a fork made meanwhile would inherit that lock shut, with nobody to open it.
    all_forked = multiprocessing.get_context("fork").Barrier(config.num_local_workers)
    try:
        check_devices(config)
        elastic_launch(launcher, work)(config, task.address, os.getpid(), all_forked, compile_ahead(config))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return WorkerFailed(-1, _how(rank, failure))
    except SignalException:
        return WorkerFailed(-1, "the workers' launcher was told to end")
    except StartError as error:
        return WorkerFailed(-1, str(error), usage=True)
    except Exception as error:  # noqa: BLE001 - torch raises all kinds when nodes do not meet
        return WorkerFailed(-1, _why_not(task, error), usage=several)
    return None


def _how(rank: int, failure: ProcessFailure) -> str:
    """In words: how a worker ended."""
    if failure.exitcode == ENGINE_GONE:
        return f"worker {rank} has lost its engine, which has ended"
    said: Any = failure.message  # whatever torch says of its type, an exception comes as a dictionary
    if isinstance(said, dict):
        said = said["message"]
    return f"worker {rank} {process.how(failure.exitcode)}" + (f": {said}" if failure.exitcode > 0 else "")


def _why_not(task: WorkerTask, error: Exception) -> str:
    """In words: why no worker was started."""
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if task.config.nodes.num_nodes > 1:
        return f"the nodes do not meet at --rdzv-endpoint {task.config.nodes.endpoint} ({reason})"
    return f"the workers cannot be started ({reason})"


def main() -> int:
    """Launch, and tell the engine how it ended."""
    logging.disable(logging.CRITICAL)  # one line says what died, and it is ours
    # torch looks for GPUs before we fork, and must not touch CUDA for that: what is forked could not use it any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    task = process.read_task(WorkerTask)
    tempfile.tempdir = task.folder  # torch makes files there while it starts processes, and we may end at any time
    watch_parent(lambda: os._exit(0))
    failed = launch(task)
    if failed is None:
        return 0
    if task.address:
        line = worker_socket(zmq.Context(), task.address, LAUNCHER)
        line.send(encode(failed))
        line.close()
    else:
        warn(f"error: {failed.reason}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
