"""Triton where it is installed: importing a kernel must not need it, a machine without a GPU runs the references."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HAS_TRITON", "next_power_of_2", "num_multiprocessors", "runs_triton", "shared_memory", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:
    HAS_TRITON = False

    def _unchanged(function: Any = None, **_: Any) -> Any:  # noqa: ANN401 - stands for a decorator
        return _unchanged if function is None else function

    triton: Any = SimpleNamespace(jit=_unchanged)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]


HOPPER_SHARED_MEMORY = 227 << 10
META_RUNS_TRITON = False
"""Whether the meta device stands for a GPU: for who only wants to know what would be launched."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor is a Triton kernel's."""
    return HAS_TRITON and (tensor.is_cuda or (META_RUNS_TRITON and tensor.is_meta))


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Programs that a device runs side by side; some for Triton's interpreter, so that its loops are real ones.

    The meta device stands for the GPU that is in use.
    """
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(None if device.type == "meta" else device).multi_processor_count


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have for itself: 227 KB on Hopper, 163 on an A100, 99 on an L4 or an RTX 4090.

    The CPU is as good as a Hopper GPU; so is what does not say.
    """
    if device.type == "cpu":
        return HOPPER_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(None if device.type == "meta" else device)
    return int(getattr(properties, "shared_memory_per_block_optin", HOPPER_SHARED_MEMORY))


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
