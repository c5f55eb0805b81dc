"""One worker process: joins the others, loads its slices, then computes one step after another."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist
import zmq
from gllm_kernels.chunk_plan import count_places, default_tuning
from gllm_kernels.jit import num_multiprocessors
from gllm_kernels.paged_attention import choose_backend

from gllm.chunk_schedule import ChunkKernel
from gllm.graph_sizes import has_token_graphs, token_graph_sizes
from gllm.policy import parse_policy
from gllm.runtime.channels import watch_connection, worker_socket
from gllm.runtime.errors import StartError
from gllm.runtime.messages import (
    Allocate,
    Allocated,
    Step,
    Stop,
    WorkerFailed,
    WorkerLoading,
    WorkerReady,
    decode_order,
    encode,
)
from gllm.runtime.models import MODELS
from gllm.runtime.weights import fill_with_dummy_weights, load_weights
from gllm.runtime.worker.groups import connect
from gllm.runtime.worker.memory import check_weights, measure_peak, room_for_blocks
from gllm.runtime.worker.outbox import Outbox
from gllm.runtime.worker.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.synchronize import Barrier

    from gllm.core import Limits
    from gllm.model_shape import ModelShape
    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.messages import Order, Report
    from gllm.runtime.model_config import ModelConfig
    from gllm.runtime.worker.compile_ahead import Ahead

    Tell = Callable[[Report], None]
    Later = Callable[[Callable[[], Report]], None]


_LOOK_S = 0.2
_LOADING_S = 1.0
_MIN_WIDTH_FOR_THREADS = 512
_MOURNING_S = 5.0  # the launcher blames whoever ends first: that must be who died, not who lost a neighbour by it


def work(config: RuntimeConfig, address: str, launcher: int, all_forked: Barrier, ahead: Ahead) -> None:
    """The whole life of a worker; torchrun's environment says which one it is. Never returns normally on an error."""
    tempfile.tempdir = None  # the launcher's is for its own files; who caches there wants to find them again
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not our parent's handler: die at once, whatever we wait for
    end_with_parent(launcher)
    all_forked.wait()
    ahead.load_compiler()
    rank = int(os.environ["RANK"])
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        address, config = _agree(address, config)
    except StartError:
        raise
    except Exception:
        time.sleep(2 * _LOOK_S)  # has our launcher ended, and the store with it, so has this process by then: silently
        raise
    line = worker_socket(zmq.Context(), address, str(rank).encode())
    is_over = threading.Event()
    watch_connection(line, is_over)

    def report(report: Report) -> None:
        line.send(encode(report))

    is_loaded = False
    try:
        worker = Worker(config, rank, device, report, _later(rank, device, address, report), ahead=ahead)
        is_loaded = True
        worker.run(lambda: decode_order(line.recv()))
        is_over.set()
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must hear of it
        _mourn(rank, error, report, is_loaded=is_loaded)
        sys.exit(1)


def _later(rank: int, device: torch.device, address: str, report: Tell) -> Later:
    """How reports of steps are made: on a GPU by a thread that may wait for it, over a line of its own."""
    if device.type == "cpu":
        return lambda make: report(make())
    line = worker_socket(zmq.Context.instance(), address, b"%d.steps" % rank)

    def send(report: Report) -> None:
        line.send(encode(report))

    def fail(error: Exception) -> None:
        _mourn(rank, error, send, is_loaded=True)
        os._exit(1)

    return Outbox(send, fail).put


def _mourn(rank: int, error: Exception, report: Tell, *, is_loaded: bool) -> None:
    """Say what went wrong, and leave others the time to say it first."""
    if os.environ.get("GLLM_TRACEBACK"):
        traceback.print_exception(error)
    report(WorkerFailed(rank, *_explain(rank, error, is_loaded=is_loaded)))
    time.sleep(_MOURNING_S)


def _agree(address: str, config: RuntimeConfig) -> tuple[str, RuntimeConfig]:
    """Node 0's word: where its engine listens, and how the model is served. A node's own is where it has the model."""
    shared: list[Any] = [address, msgspec.json.encode(config)]
    dist.broadcast_object_list(shared, device=torch.device("cpu"))
    theirs = msgspec.json.decode(shared[1], type=type(config))
    if theirs.num_workers != dist.get_world_size():
        raise StartError("the nodes do not agree on --pp, --tp or --nnodes; start them with the same options")
    return shared[0], replace(theirs, nodes=config.nodes, model=config.model)


def check_devices(config: RuntimeConfig) -> None:
    """See that this node has a GPU for each worker, unless they compute on the CPU.

    Raises:
        StartError: It has not.
    """
    found, needed = torch.cuda.device_count(), config.num_local_workers
    if (config.device == "cuda" or (config.device == "auto" and found)) and needed > found:
        raise StartError(
            f"{needed} workers need a GPU each, torch finds {found} here; lower --tp or --pp, or choose --device cpu"
        )


def choose_device(config: RuntimeConfig) -> torch.device:
    """This worker's device."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _explain(rank: int, error: Exception, *, is_loaded: bool) -> tuple[str, bool]:
    """A line, and whether the user can mend it."""
    if isinstance(error, ValueError) and not is_loaded:
        return str(error), True
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        mend = "lower --num-blocks, --max-num-seqs or --gpu-memory-utilization, or raise --tp or --pp"
        return f"worker {rank} ran out of memory; {mend}", True
    return f"worker {rank} failed: {type(error).__name__}: {error} (GLLM_TRACEBACK=1 shows where)", False


def end_with_parent(parent: int) -> None:
    """A fork whose parent is gone has nobody to work for. It inherits pipes, so their ends tell nothing.

    Whose process that was is the parent's own word: it may have died before its child could ask.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


class Worker:
    """A rank's part of the model. It follows orders.

    Args:
        config: of the whole engine.
        rank: which part this is.
        device: where it computes.
        report: tells the engine something now.
        later: takes what makes a report of a step, to be called when the device may be waited for.
        ahead: compiles what is computed with.

    Raises:
        ValueError: The model cannot be loaded; the message says why.
    """

    def __init__(
        self, config: RuntimeConfig, rank: int, device: torch.device, report: Tell, later: Later, *, ahead: Ahead
    ) -> None:
        self._config, self._rank, self._report, self._later = config, rank, report, later
        self._stage: Stage | None = None
        self._told = time.monotonic()
        model = config.check()
        longest = config.max_model_len or model.max_position_embeddings
        self._limits = config.limits(num_blocks=-(-longest // config.block_size))  # until the engine says how many
        self._policy = parse_policy(config.policy)
        if device.type == "cpu":
            torch.set_num_threads(num_threads(model, config.num_local_workers))
        dtype = choose_dtype(config, model, device)
        shard, self._neighbours = connect(
            config.parallel,
            model.shape,
            rank,
            device,
            self._limits.max_in_flight,
            largest_bytes=self._policy.max_batch_tokens(self._limits) * model.shape.hidden_size * dtype.itemsize,
        )
        self._backend = choose_backend(
            config.attention_backend,
            device=device,
            dtype=dtype,
            head_dim=model.shape.head_dim,
            block_size=config.block_size,
        )
        check_weights(model.shape, shard, config, dtype.itemsize, device)
        self._model = MODELS[model.architecture](model, shard, dtype, device)
        if config.load_format == "dummy":
            fill_with_dummy_weights(self._model, seed=config.seed)
        else:
            load_weights(self._model, Path(config.model), progress=self._tell_loading)
        self._model.eval()
        ahead.wait()
        num_blocks = room_for_blocks(
            model.shape, shard, config, self._limits, dtype=dtype, device=device, peak_bytes=self._peak_bytes(device)
        )
        kernel = chunk_kernel(self._backend, model.shape, config.parallel.tp, dtype, device)
        report(WorkerReady(rank, num_blocks, describe(device), kernel))

    def _peak_bytes(self, device: torch.device) -> int:
        """What the largest step takes on a GPU; computing it also compiles its kernels."""
        if device.type == "cpu":
            return 0
        stage = self._make_stage(replace(self._limits, num_blocks=1))
        max_tokens = self._policy.max_batch_tokens(self._limits)
        peak = measure_peak(lambda: stage.rehearse(max_tokens), device)
        if self._config.cuda_graphs and has_token_graphs(self._backend):  # their memory is a pool of its own
            largest = token_graph_sizes(max_tokens, self._model.config.shape, self._config.parallel.tp)[-1]
            peak += measure_peak(lambda: stage.rehearse(largest), device)
        return peak

    def _tell_loading(self, num_read: int, num_tensors: int) -> None:
        if time.monotonic() - self._told > _LOADING_S:
            self._told = time.monotonic()
            self._report(WorkerLoading(self._rank, num_read, num_tensors))

    def run(self, receive: Callable[[], Order]) -> None:
        """Follow orders until one says to stop."""
        while True:
            order = receive()
            if isinstance(order, Step):
                assert self._stage is not None
                self._stage.run(order)
            elif isinstance(order, Allocate):
                self._allocate(order.num_blocks)
            elif isinstance(order, Stop):
                return

    def _allocate(self, num_blocks: int) -> None:
        limits = replace(self._limits, num_blocks=num_blocks)
        self._stage = self._make_stage(limits)
        if self._model.device.type == "cuda" and self._config.cuda_graphs:
            # In a small cache the largest step may be smaller than the one that memory was set aside for.
            self._stage.capture(self._policy.max_batch_tokens(limits))
        self._report(Allocated(self._rank))

    def _make_stage(self, limits: Limits) -> Stage:
        stage, tp_rank = divmod(self._rank, self._config.parallel.tp)
        return Stage(
            self._model,
            self._neighbours,
            stage=stage,
            limits=limits,
            backend=self._backend,
            report=self._later if tp_rank == 0 else None,
            keeps_time=self._config.record is not None,
        )


def num_threads(model: ModelConfig, num_workers: int) -> int:
    """Threads of each of this machine's workers on its CPU.

    Those of a narrow model would wait for each other at every operation for longer than they compute, and where the
    cores have other work too, for seconds.
    """
    if model.shape.hidden_size < _MIN_WIDTH_FOR_THREADS:
        return 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // num_workers)


def choose_dtype(config: RuntimeConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The numbers to compute with: as the model was trained, except that a CPU computes in float32."""
    if config.dtype != "auto":
        name: str = config.dtype
    else:
        name = "float32" if device.type == "cpu" else model.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def chunk_kernel(
    backend: str, shape: ModelShape, tp: int, dtype: torch.dtype, device: torch.device
) -> ChunkKernel | None:
    """What the schedule of chunks' attention depends on; None where that is not our kernel."""
    if backend != "triton":
        return None
    tuning, num_kv_heads = default_tuning(shape.head_dim, dtype), shape.kv_heads_on(tp)
    return ChunkKernel(
        rows=tuning.rows,
        tile=tuning.tile,
        least_tiles=tuning.least_tiles,
        places=count_places(tuning, num_kv_heads, device),
        kv_heads=num_kv_heads,
        group_size=shape.num_heads // tp // num_kv_heads,
        multiprocessors=num_multiprocessors(device),
    )


def describe(device: torch.device) -> str:
    """A device's name, for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
