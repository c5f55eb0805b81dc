"""Products of few rows with what stands before and after them, in bf16 at the sizes of Qwen3."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from gllm_kernels.few_rows import Tuning, linear, linear_reference, linear_triton

from kernel_cases.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel_cases.case import Work

EPS = 1e-6
NUM_ROWS = (1, 4, 16, 32)


class Product(NamedTuple):
    """One product of a layer, or the head."""

    name: str
    num_weights: int
    size: int
    norm: bool = False
    residual: bool = False
    gated: bool = False


PRODUCTS = (
    Product("8B qkv", 6144, 4096, norm=True),
    Product("8B out", 4096, 4096, residual=True),
    Product("8B gate-up", 24576, 4096, norm=True, gated=True),
    Product("8B down", 4096, 12288, residual=True),
    Product("8B head", 151936, 4096, norm=True),
    Product("0.6B qkv", 4096, 1024, norm=True),
    Product("0.6B out", 1024, 2048, residual=True),
    Product("0.6B gate-up", 6144, 1024, norm=True, gated=True),
    Product("0.6B down", 1024, 3072, residual=True),
    Product("0.6B head", 151936, 1024, norm=True),
)
ONE_ROW_SETTINGS = [
    Tuning(*each, num_stages=1)
    for each in (
        (1, 1024, 1), (1, 1024, 2), (1, 1024, 4), (2, 512, 1), (2, 512, 2), (2, 1024, 2), (2, 1024, 4),
        (4, 256, 1), (4, 512, 2), (4, 1024, 4), (4, 1024, 8), (8, 256, 2), (8, 512, 4), (8, 1024, 8), (16, 256, 4),
    )
]  # fmt: skip
FEW_ROWS_SETTINGS = [
    Tuning(*each)
    for each in (
        (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 6), (64, 128, 4, 8), (64, 64, 4, 8),
        (64, 256, 4, 3), (64, 256, 4, 4), (128, 64, 4, 6), (128, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4),
        (32, 256, 2, 4), (16, 256, 4, 4), (16, 256, 2, 6), (16, 512, 4, 3), (16, 512, 4, 4),
    )
]  # fmt: skip


def random(*size: int) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(size, dtype=torch.bfloat16, device="cuda")


def works(run: Callable[..., object], each: Product, num_rows: int, copies: int) -> list[Work]:
    """One call for each copy of the weights."""
    num_outs = each.num_weights // 2 if each.gated else each.num_weights

    def work() -> Work:
        x, weight = random(num_rows, each.size), random(each.num_weights, each.size)
        options: dict[str, Any] = {"gated": each.gated}
        if each.norm:
            options |= {"gain_K": random(each.size), "eps": EPS}
        if each.residual:
            options["residual_MO"] = random(num_rows, num_outs)
        return lambda: run(x, weight, **options)

    return [work() for _ in range(copies)]


def product_alone(x: torch.Tensor, weight: torch.Tensor, **_: object) -> torch.Tensor:
    """What cuBLAS does of it."""
    return torch.nn.functional.linear(x, weight)


def case(each: Product, num_rows: int, run: Callable[..., object], settings: str = "") -> Case:
    """One case, as `run` does it."""
    num_outs = each.num_weights // 2 if each.gated else each.num_weights
    num_elements = each.num_weights * each.size + num_rows * (each.size + num_outs)
    num_elements += each.size * each.norm + num_rows * num_outs * each.residual
    rivals = {"one after the other": linear_reference, "cuBLAS alone": product_alone}
    return Case(
        op="few_rows",
        size=f"{each.name}, {num_rows} rows{settings}",
        make=partial(works, run, each, num_rows),
        num_bytes=2 * num_elements,
        num_flops=2 * num_rows * each.num_weights * each.size,
        rivals={} if settings else {name: partial(works, rival, each, num_rows) for name, rival in rivals.items()},
    )


def cases() -> list[Case]:
    """A layer's products and the head, as they are used."""
    return [case(each, num, linear) for each, num in product(PRODUCTS, NUM_ROWS)]


def sweep() -> list[Case]:
    """The kernels with other settings; without a norm for several rows, which would be one of another kernel's."""
    return [
        case(
            each._replace(norm=each.norm and num == 1),
            num,
            partial(linear_triton, tuning=tuning),
            f", {'/'.join(map(str, tuning))}",
        )
        for each, num in product(PRODUCTS, NUM_ROWS)
        for tuning in (ONE_ROW_SETTINGS if num == 1 else FEW_ROWS_SETTINGS)
        if not (each.gated and tuning.block_n == 1)
    ]
