"""Norms, gates, and all that lies between the QKV projection and attention, in bf16 at the sizes of Qwen3."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from gllm_kernels.qkv import norm_rotate_cache, norm_rotate_cache_reference, norm_rotate_cache_triton
from gllm_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, add_rms_norm_triton
from gllm_kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference, silu_and_mul_triton

from kernel_cases.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel_cases.case import Work

EPS, BLOCK_SIZE = 1e-6, 16
NUM_TOKENS = (1, 64, 256, 8192)


class Shape(NamedTuple):
    """What these operations see of a model."""

    name: str
    hidden_size: int
    width: int  # of the MLP
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128


SHAPES = (Shape("0.6B", 1024, 3072, 16, 8), Shape("8B", 4096, 12288, 32, 8))


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(size, dtype=dtype, device="cuda")


def norm_works(run: Callable[..., object], shape: Shape, num_tokens: int, copies: int) -> list[Work]:
    """One call of add_rms_norm for each copy of its inputs."""
    size = shape.hidden_size

    def work() -> Work:
        x, residual, weight = random(num_tokens, size), random(num_tokens, size), random(size)
        return lambda: run(x, residual, weight, EPS)

    return [work() for _ in range(copies)]


def silu_works(run: Callable[..., object], shape: Shape, num_tokens: int, copies: int) -> list[Work]:
    """The same of silu_and_mul."""

    def work() -> Work:
        gate_up = random(num_tokens, 2 * shape.width)
        return lambda: run(gate_up)

    return [work() for _ in range(copies)]


def qkv_works(run: Callable[..., object], shape: Shape, num_tokens: int, copies: int) -> list[Work]:
    """The same of norm_rotate_cache; the tokens go to random slots of a cache with twice as many."""
    num_blocks = -(-2 * num_tokens // BLOCK_SIZE)

    def work() -> Work:
        qkv = random(num_tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        weights = random(shape.head_dim), random(shape.head_dim)
        angles = 100 * random(num_tokens, shape.head_dim // 2, dtype=torch.float32)
        caches = [random(num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_tokens]
        inputs = qkv, *weights, angles.cos(), angles.sin(), *caches, slots
        return lambda: run(*inputs, eps=EPS, interleaved=False)

    return [work() for _ in range(copies)]


def num_bytes(op: str, shape: Shape, num_tokens: int) -> float:
    """What an operation reads and writes at least."""
    if op == "add_rms_norm":
        return 2 * (4 * num_tokens + 1) * shape.hidden_size
    if op == "silu_and_mul":
        return 2 * 3 * num_tokens * shape.width
    channels = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return num_tokens * (2 * 2 * channels + 4 * shape.head_dim + 8)


WORKS = {"add_rms_norm": norm_works, "silu_and_mul": silu_works, "norm_rotate_cache": qkv_works}
OURS = {"add_rms_norm": add_rms_norm, "silu_and_mul": silu_and_mul, "norm_rotate_cache": norm_rotate_cache}
TORCH = {
    "add_rms_norm": add_rms_norm_reference,
    "silu_and_mul": silu_and_mul_reference,
    "norm_rotate_cache": norm_rotate_cache_reference,
}
TUNED = {
    "add_rms_norm": [partial(add_rms_norm_triton, elements_per_thread=each) for each in (8, 16, 32)],
    "silu_and_mul": [
        partial(silu_and_mul_triton, block=block, elements_per_thread=each)
        for block, each in product((512, 1024, 2048, 4096), (8, 16))
    ],
    "norm_rotate_cache": [
        partial(norm_rotate_cache_triton, heads_per_program=heads, elements_per_thread=each)
        for heads, each in product((2, 4, 8, 16, 32), (8, 16))
    ],
}


def case(op: str, shape: Shape, num_tokens: int, run: Callable[..., object], settings: str = "") -> Case:
    """One case of one operation, as `run` does it."""

    def by(other: Callable[..., object]) -> Callable[[int], list[Work]]:
        return lambda copies: WORKS[op](other, shape, num_tokens, copies)

    return Case(
        op=op,
        size=f"{shape.name}, {num_tokens} tokens{settings}",
        make=by(run),
        num_bytes=num_bytes(op, shape, num_tokens),
        rivals={} if settings else {"torch": by(TORCH[op])},
    )


def cases() -> list[Case]:
    """Decode steps of a few sizes and a chunk of prompts."""
    return [case(op, shape, num, OURS[op]) for op, shape, num in product(OURS, SHAPES, NUM_TOKENS)]


def sweep() -> list[Case]:
    """The kernels with other settings."""
    return [
        case(op, shape, num, run, ", " + " ".join(f"{name}={value}" for name, value in run.keywords.items()))
        for op, shape, num in product(OURS, SHAPES, NUM_TOKENS)
        for run in TUNED[op]
    ]
