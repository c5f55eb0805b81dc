"""Sampled tokens on their way from the device to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Arrival:
    """Tokens on their way to the host: the only thing of a step that anyone waits for."""

    def __init__(self, tokens_R: Tensor) -> None:
        self._tokens = tokens_R.to(torch.int32)
        self._event: torch.cuda.Event | None = None
        if tokens_R.is_cuda:
            on_host = torch.empty(tokens_R.shape, dtype=torch.int32, pin_memory=True)
            self._tokens = on_host.copy_(self._tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> bytes:
        """The tokens, packed."""
        if self._event is not None:
            self._event.synchronize()
        packed: bytes = self._tokens.numpy().tobytes()
        return packed
