"""Router and experts in bf16, at the sizes of Qwen3-30B-A3B (whole, and a half of it either way) and Mixtral 8x7B."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from gllm_kernels.moe import Tiles, choose_tiles, experts, experts_triton
from gllm_kernels.routing import route, route_reference
from torch.nn import functional

from kernel_cases.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel_cases.case import Work


class Shape(NamedTuple):
    """A layer of experts on one rank."""

    name: str
    hidden_size: int
    width: int
    num_experts: int
    num_chosen: int
    num_held: int
    first_held: int = 0


WHOLE = Shape("30B-A3B", 2048, 768, 128, 8, 128)
EXPERT_HALF = WHOLE._replace(name="30B-A3B EP 2", num_held=64, first_held=64)
WIDTH_HALF = WHOLE._replace(name="30B-A3B TP 2", width=384)
MIXTRAL = Shape("Mixtral", 4096, 14336, 8, 2, 8)


def works(run: Callable[..., object], shape: Shape, num_tokens: int, copies: int) -> list[Work]:
    """One call for each draw of tokens and choices; the experts, which no cache holds, are those of all calls."""
    size, width, num_held = shape.hidden_size, shape.width, shape.num_held
    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    gate_up, down = random(num_held, 2 * width, size).div_(size**0.5), random(num_held, size, width).div_(width**0.5)

    def work() -> Work:
        x = random(num_tokens, size)
        weights, ids = route_reference(random(num_tokens, shape.num_experts), shape.num_chosen, normalised=True)
        return lambda: run(x, gate_up, down, weights, ids, first_expert=shape.first_held, num_experts=shape.num_experts)

    return [work() for _ in range(copies)]


def grouped_mm(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    first_expert: int,
    num_experts: int,
) -> torch.Tensor:
    """The same with torch's grouped products, where all experts are held."""
    assert first_expert == 0
    assert num_experts == len(down)
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts, device=ids.device), right=True).int()
    gate, up = torch._grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=ends).chunk(2, -1)  # noqa: SLF001
    y = torch._grouped_mm(functional.silu(gate) * up, down.mT, offs=ends)  # noqa: SLF001
    by_token = torch.empty_like(y).index_copy_(0, order, y).view(*ids.shape, -1)
    return (by_token * weights[..., None]).sum(1).to(x.dtype)


def case(shape: Shape, num_tokens: int, run: Callable[..., object] = experts, settings: str = "") -> Case:
    """One layer's experts; an expert that no token chose is not read."""
    num_matrix = 3 * shape.hidden_size * shape.width
    num_hit = shape.num_held * (1 - (1 - shape.num_chosen / shape.num_experts) ** num_tokens)
    num_choices = num_tokens * shape.num_chosen * shape.num_held / shape.num_experts
    has_rival = not settings and shape.num_held == shape.num_experts
    return Case(
        op="experts",
        size=f"{shape.name}, {num_tokens} tokens{settings}",
        make=partial(works, run, shape, num_tokens),
        num_bytes=2 * (num_hit * num_matrix + 2 * num_tokens * shape.hidden_size),
        num_flops=2 * num_choices * num_matrix,
        rivals={"torch grouped_mm": partial(works, grouped_mm, shape, num_tokens)} if has_rival else {},
    )


def route_works(run: Callable[..., object], num_tokens: int, copies: int) -> list[Work]:
    """One call of the router for each draw of scores."""
    scores = torch.randn(copies, num_tokens, WHOLE.num_experts, device="cuda", dtype=torch.bfloat16)
    return [partial(run, each, WHOLE.num_chosen, normalised=True) for each in scores]


def cases() -> list[Case]:
    """Decode steps of a few sizes and chunks of prompts."""
    sizes = [*product((WHOLE, EXPERT_HALF, WIDTH_HALF), (1, 16, 256, 4096, 16384)), (MIXTRAL, 256)]
    router = Case(
        op="route",
        size="256 tokens, 8 of 128 experts",
        make=partial(route_works, route, 256),
        num_bytes=256 * (2 * WHOLE.num_experts + 8 * WHOLE.num_chosen),
        rivals={"torch": partial(route_works, route_reference, 256)},
    )
    return [router, *(case(shape, num_tokens) for shape, num_tokens in sizes)]


FEW = [(16, *tile) for tile in ((32, 128, 8, 4, 4), (32, 256, 8, 4, 3), (64, 128, 8, 4, 3), (64, 256, 8, 4, 3))]
SOME = [
    (32, 64, 256, 8, 4, 3),
    (32, 128, 128, 8, 4, 3),
    (32, 128, 64, 8, 4, 5),
    (64, 64, 128, 8, 4, 4),
    (64, 128, 64, 8, 4, 4),
    (64, 128, 128, 8, 4, 3),
]
MORE = [
    *((64, *tile) for tile in ((128, 64, 8, 4, 4), (128, 128, 8, 4, 3), (256, 64, 8, 8, 4))),
    *((128, 128, 64, 8, *run) for run in ((4, 4), (8, 3), (8, 4))),
    *((128, 256, 64, 8, *run) for run in ((8, 3), (8, 4))),
]
MANY = [
    (64, 128, 64, 8, 4, 4),
    (64, 256, 64, 8, 4, 4),
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 4, 4),
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 16, 8, 4),
    (128, 256, 64, 4, 8, 4),
    (256, 128, 64, 8, 8, 4),
]
SWEPT = {
    1: FEW,
    16: [*FEW, (16, 128, 128, 8, 4, 3)],
    64: [*FEW, *SOME[:2]],
    256: SOME,
    **dict.fromkeys((384, 640, 768, 1024, 1152, 1280, 1536, 2048), MORE),
    4096: MANY,
    16384: MANY,
}


def sweep() -> list[Case]:
    """Other tiles for one product, those chosen by default for the other."""
    found = []
    for num_tokens, candidates in SWEPT.items():
        chosen = choose_tiles(num_tokens * WHOLE.num_chosen / WHOLE.num_experts, torch.bfloat16)
        for place, candidate in product((0, 1), candidates):
            tiles = [*chosen]
            tiles[place] = Tiles(*candidate)
            settings = f", {('gate_up', 'down')[place]} {'/'.join(map(str, candidate))}"
            found.append(case(WHOLE, num_tokens, partial(experts_triton, tiles=tuple(tiles)), settings))
    return found
