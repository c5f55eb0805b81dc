"""Which part of a model one rank holds, and whom it talks to within its stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Communicator(Protocol):
    """The ranks of one stage, who hold slices of the same layers and step through them together."""

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum of everyone's tensor; the argument may be overwritten."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor side by side along the last dimension, in the order of ranks."""
        ...


@dataclass(frozen=True, slots=True)
class SoloCommunicator:
    """A stage of one rank: sum and concatenation of one tensor are that tensor."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part: some layers, and of each a slice.

    Projections are cut into `tp_size` slices. Experts are spread over `ep_size` groups of neighbouring ranks, and
    the ranks of a group hold slices of each of its experts.
    """

    layers: range  # global indices of the layers of this stage
    tp_rank: int = 0
    tp_size: int = 1
    ep_size: int = 1
    is_first: bool = True  # holds the embedding
    is_last: bool = True  # holds the final norm and the head
    group: Communicator = SoloCommunicator()

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp_size, f"rank {self.tp_rank} of {self.tp_size}"
        assert self.tp_size % self.ep_size == 0, f"ep {self.ep_size} does not divide tp {self.tp_size}"
        assert (self.group.rank, self.group.size) == (self.tp_rank, self.tp_size), "the group is not this stage's"

    @property
    def expert_tp_size(self) -> int:
        """Slices each expert is cut into."""
        return self.tp_size // self.ep_size

    @property
    def expert_tp_rank(self) -> int:
        """Which of those slices this rank holds."""
        return self.tp_rank % self.expert_tp_size

    @property
    def ep_rank(self) -> int:
        """Which group of experts this rank holds."""
        return self.tp_rank // self.expert_tp_size


def slice_of(size: int, num_slices: int, index: int, *, what: str) -> slice:
    """One of equal slices of a dimension.

    Raises:
        ValueError: the slices would not be equal; names the dimension.
    """
    if size % num_slices:
        raise ValueError(f"{what} {size} cannot be cut into {num_slices} equal slices; choose another --tp or --ep")
    width = size // num_slices
    return slice(index * width, (index + 1) * width)
