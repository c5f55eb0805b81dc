"""Choosing tokens: the draw, and the floors of top-k and top-p. What counts is that the logits are read once."""

# ruff: noqa: N803, N806 - tensors carry their shape in their name

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from gllm_kernels.draw import draw
from gllm_kernels.filters import likely_floors

from kernel_cases.case import Case

if TYPE_CHECKING:
    from torch import Tensor

    from kernel_cases.case import Work

_VOCAB_SIZE = 151_936
_FILTERS = {"top-p 0.9": (0, 0.9, 0.0), "top-k 50": (50, 1.0, 0.0), "top-k 50, top-p 0.9": (50, 0.9, 0.0)}


def _logits(num_rows: int) -> Tensor:
    """As spread as a model's: few tokens have most of the probability."""
    return (torch.randn(num_rows, _VOCAB_SIZE, device="cuda") * 3).bfloat16()


def _draws(num_rows: int, temperature: float, copies: int) -> list[Work]:
    slots_S = torch.arange(num_rows, device="cuda")
    temperatures_N = torch.full((num_rows,), temperature, device="cuda")
    seeds_N = torch.randint(2**62, (num_rows,), device="cuda")
    steps_N = torch.zeros_like(slots_S)
    return [partial(draw, _logits(num_rows), slots_S, temperatures_N, seeds_N, steps_N) for _ in range(copies)]


def _floors(num_rows: int, top_k: int, top_p: float, min_p: float, copies: int) -> list[Work]:
    slots_S = torch.arange(num_rows, device="cuda")
    columns = (
        torch.ones(num_rows, device="cuda"),
        torch.full_like(slots_S, top_k),
        torch.full((num_rows,), top_p, device="cuda"),
        torch.full((num_rows,), min_p, device="cuda"),
    )
    return [partial(likely_floors, _logits(num_rows), slots_S, *columns) for _ in range(copies)]


def _softmaxes(num_rows: int, copies: int) -> list[Work]:
    """What torch draws a token with."""

    def work(logits_SV: Tensor) -> Tensor:
        probs_SV = logits_SV.float().softmax(dim=-1)
        return probs_SV.div_(torch.empty_like(probs_SV).exponential_()).argmax(dim=-1)

    return [partial(work, _logits(num_rows)) for _ in range(copies)]


def _sorts(num_rows: int, copies: int) -> list[Work]:
    """The sort that a plain top-p begins with."""
    return [partial(torch.sort, _logits(num_rows), dim=-1, descending=True) for _ in range(copies)]


def cases() -> list[Case]:
    """Rows of Qwen3's vocabulary in bfloat16."""
    return [
        Case(
            op="draw",
            size=f"{num_rows} rows of {_VOCAB_SIZE} at temperature {temperature:g}",
            make=partial(_draws, num_rows, temperature),
            num_bytes=num_rows * _VOCAB_SIZE * 2,
            rivals={"softmax, exponential, argmax": partial(_softmaxes, num_rows)} if temperature else {},
        )
        for num_rows in (1, 64, 256, 512)
        for temperature in (1.0, 0.0)
    ] + [
        Case(
            op="likely_floors",
            size=f"{num_rows} rows of {_VOCAB_SIZE}, {name}",
            make=partial(_floors, num_rows, *numbers),
            num_bytes=num_rows * _VOCAB_SIZE * 2,
            rivals={"sort": partial(_sorts, num_rows)},
        )
        for num_rows in (1, 256)
        for name, numbers in _FILTERS.items()
    ]
