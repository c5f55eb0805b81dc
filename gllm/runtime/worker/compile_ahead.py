"""Fills Triton's cache on disk while workers connect and load weights, so that a first start waits less for compilers.

The launcher forks one process for it. That one takes a stage's first steps on a device without memory (`first_steps`),
where kernels are launched as the workers will launch them; Triton, asked for a variant of a kernel that is new, calls
a hook instead, which forks a process that compiles it and ends. The workers wait for all of these just before they
take their own first steps. A file in the cache says that all this was done, and need not be done again.

Nothing depends on it: what fails here is compiled by the workers, as if nobody had tried.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gllm_kernels
import torch
from gllm_kernels.jit import HAS_TRITON

import gllm.runtime
from gllm.runtime.worker.first_steps import take_first_steps
from gllm.runtime.worker.worker import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from gllm.runtime.config import RuntimeConfig

PATIENCE_S = 60.0  # beyond it a worker compiles for itself: something must be wrong with the compilers
_SWITCH_S = 1e-4  # how long a thread of the process that goes ahead keeps the interpreter when another one wants it


class Ahead:
    """What is compiled ahead of the workers of this node.

    Args:
        ended: its other end is open for as long as anybody compiles; None: nobody does.
    """

    def __init__(self, ended: Connection | None = None) -> None:
        self._ended = ended

    def load_compiler(self) -> None:
        """Have a thread do what every process that launches has to do first, if this one will."""
        if self._ended is not None:
            threading.Thread(target=_load_compiler, daemon=True, name="load-compiler").start()

    def wait(self) -> None:
        """Wait until all is compiled, or given up."""
        if self._ended is not None:
            self._ended.poll(PATIENCE_S)


def compile_ahead(config: RuntimeConfig) -> Ahead:
    """Start to compile what this node's workers will launch, if they have GPUs; CUDA must not be in use here."""
    if not HAS_TRITON or config.device == "cpu" or not torch.cuda.is_available():
        return Ahead()
    context = multiprocessing.get_context("fork")
    try:
        ended, working = context.Pipe(duplex=False)
        # Every process that compiles inherits that end. A daemon: it ends with the launcher.
        context.Process(target=_run, args=(config, os.getpid(), working), daemon=True, name="compile-ahead").start()
    except OSError as error:  # no more processes or files
        _tell(error)
        return Ahead()
    working.close()
    return Ahead(ended)


def _load_compiler() -> None:
    """Triton names what it caches by a hash of its own files, several hundred megabytes."""
    with suppress(Exception):  # not a public function: where there is none, it is done when it is needed
        from triton.runtime.cache import triton_key  # noqa: PLC0415 - Triton may not be installed

        triton_key()


def _run(config: RuntimeConfig, launcher: int, _working: Connection) -> None:
    """The life of the process that goes ahead. It prints nothing, and takes no memory of a GPU."""
    end_with_parent(launcher)
    _silence()
    try:
        device = torch.cuda.get_device_properties(0)  # makes no context
        arch = 10 * device.major + device.minor
        mark = mark_of(config, arch=arch, num_multiprocessors=device.multi_processor_count)
        if not mark.exists():
            compile_first_steps(config, arch=arch)
            mark.touch()
    except Exception as error:  # noqa: BLE001 - whatever it is, workers compile for themselves
        _tell(error)
    os._exit(0)


def mark_of(config: RuntimeConfig, *, arch: int, num_multiprocessors: int) -> Path:
    """The file in Triton's cache that says that all was compiled for this model, these options, this code and this GPU.

    Multiprocessors count: some kernels are compiled for lists as long as there are of them.
    """
    import triton  # noqa: PLC0415 - Triton may not be installed

    gpu = arch, num_multiprocessors
    told = hashlib.sha256(repr((config, config.check(), gpu, triton.__version__, torch.__version__)).encode())
    for folder in (Path(gllm.runtime.__file__).parent, Path(gllm_kernels.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            told.update(path.read_bytes())
    return Path(triton.knobs.cache.dir, f"gllm-{told.hexdigest()[:32]}")


def _silence() -> None:
    """Compilers warn, on standard error."""
    if not os.environ.get("GLLM_TRACEBACK"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _tell(error: Exception) -> None:
    if os.environ.get("GLLM_TRACEBACK"):
        traceback.print_exception(error)


def compile_first_steps(config: RuntimeConfig, *, arch: int) -> None:
    """Compile what the first steps launch on GPUs of this architecture (90: Hopper); changes this process for good."""
    compilers = Compilers(_most_at_once(config.num_local_workers))
    compilers.submit(_build_utilities)
    gc.disable()  # the first operations import a lot, and what is imported stays
    # Meanwhile a thread hashes. It lets go of the interpreter twice a megabyte, and would wait 5 ms to have it back.
    sys.setswitchinterval(_SWITCH_S)
    loading = threading.Thread(target=_load_compiler, daemon=True, name="load-compiler")
    loading.start()

    def on_new(kernel: Any, told: str) -> None:  # noqa: ANN401 - Triton has no types
        loading.join()  # each compiler needs what it found, and a fork would copy its locks without it
        compilers.submit(lambda: compile_variant(kernel, told))

    try:
        divert_launches(on_new, arch=arch)
        take_first_steps(config)
    finally:
        compilers.join()


def _most_at_once(num_workers: int) -> int:
    """A core for each compiler: who is to find the next variant would wait for the first compiler that ends.

    The workers, which read their weights meanwhile, need one each, and who looks for variants needs one too.
    """
    return max(2, _num_cores() - num_workers - 1)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Compilers:
    """Processes that do one thing each, so many at once."""

    def __init__(self, most_at_once: int) -> None:
        self._most_at_once = most_at_once
        self.running: set[int] = set()  # process ids

    def submit(self, work: Callable[[], object]) -> None:
        """Fork a process for it, as soon as there is room."""
        while len(self.running) == self._most_at_once:
            self._wait()
        parent, child = os.getpid(), os.fork()
        if child:
            self.running.add(child)
            return
        try:
            end_with_parent(parent)
            work()
        except Exception as error:  # noqa: BLE001 - as for all that goes ahead
            _tell(error)
        finally:
            os._exit(0)

    def join(self) -> None:
        """Wait for all."""
        while self.running:
            self._wait()

    def _wait(self) -> None:
        ended, _ = os.wait()
        self.running.discard(ended)


def _build_utilities() -> None:
    """The C code by which Triton loads kernels."""
    from triton.backends.nvidia.driver import CudaUtils  # noqa: PLC0415 - Triton may not be installed

    CudaUtils()


def compile_variant(kernel: Any, told: str) -> None:  # noqa: ANN401 - Triton has no types
    """A variant of a kernel, as Triton tells it in JSON, and the C code that launches it."""
    from triton import knobs  # noqa: PLC0415 - Triton may not be installed
    from triton.runtime.driver import driver  # noqa: PLC0415

    knobs.runtime.jit_cache_hook = None
    compiled = kernel.preload(told)
    driver.active.launcher_cls(compiled.src, compiled.metadata)


def divert_launches(on_new: Callable[[Any, str], object], *, arch: int) -> None:
    """From now on, no launch of a Triton kernel runs in this process; each variant goes to `on_new` once instead."""
    from triton import knobs  # noqa: PLC0415 - Triton may not be installed
    from triton.runtime.driver import driver  # noqa: PLC0415

    seen = set()

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002, ANN401 - Triton's
        if (fn.name, key) not in seen:
            seen.add((fn.name, key))
            on_new(fn.jit_function, compile["specialization_data"])
        return True  # Triton is to leave it at that

    driver.set_active(_driver(arch))
    knobs.runtime.jit_cache_hook = hook


def _driver(arch: int) -> object:
    """Stands for Triton's driver: knows what kind of GPU there is, and asks nothing of it."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - Triton may not be installed
    from triton.backends.nvidia.driver import CudaLauncher  # noqa: PLC0415

    class Driver:
        launcher_cls = CudaLauncher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    return Driver()
