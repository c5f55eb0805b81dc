"""How a layer's parameters hold slices of the tensors in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.runtime.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a module's weights live."""

    shard: Shard
    dtype: torch.dtype
    device: torch.device


class Part(NamedTuple):
    """One tensor of a checkpoint as one parameter sees it."""

    name: str  # "q", "gate", "5.up"; "" where the parameter is that one tensor
    full_shape: tuple[int, ...]  # in the checkpoint
    source: tuple[slice, ...]  # the slice of it that this rank holds
    target: tuple[slice | int, ...]  # where in the parameter that slice goes


class Sharded(nn.Module):
    """A module with parameters of its own; `parts` says what each is filled with."""

    def __init__(self, place: Placement) -> None:
        super().__init__()
        self.shard = place.shard
        self.parts: dict[str, tuple[Part, ...]] = {}
        self._place = place

    def add(self, name: str, shape: Sequence[int], parts: Sequence[Part]) -> None:
        """Register a parameter, to be filled from these parts; what none of them covers stays zero."""
        empty = torch.zeros(tuple(shape), dtype=self._place.dtype, device=self._place.device)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.parts[name] = tuple(parts)


class Rows(NamedTuple):
    """Rows of one projection: how many the whole model has, and which this rank holds."""

    name: str
    full: int
    held: slice

    @property
    def num_held(self) -> int:
        """Rows on this rank."""
        return int(self.held.stop - self.held.start)


def stacked(rows: Sequence[Rows], columns: Sequence[int] = ()) -> tuple[list[int], list[Part]]:
    """Shape and parts of a parameter that stacks slices of several projections (without columns: of biases)."""
    parts, end = [], 0
    for each in rows:
        start, end = end, end + each.num_held
        whole = tuple(slice(0, size) for size in columns)
        parts.append(Part(each.name, (each.full, *columns), (each.held, *whole), (slice(start, end),)))
    return [end, *columns], parts
