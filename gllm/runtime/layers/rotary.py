"""Angles of the rotary position embedding. Shapes: T tokens, R pairs of dimensions that turn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.runtime.model_config import Rope


class RotaryAngles(nn.Module):
    """Cosines and sines of each token's angles; once per micro-batch, for all layers."""

    inverse_R: Tensor

    def __init__(self, rope: Rope, *, device: torch.device) -> None:
        super().__init__()
        self.factor = rope.attention_factor
        # Computed on the CPU in any case: ranks on other devices must agree to the last bit.
        self.register_buffer("inverse_R", inverse_frequencies(rope).to(device), persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, R] each."""
        angles_TR = positions_T[:, None].float() * self.inverse_R
        return angles_TR.cos() * self.factor, angles_TR.sin() * self.factor


def inverse_frequencies(rope: Rope) -> Tensor:
    """Radians per position of each pair, float32 [R] on the CPU."""
    exponents_R = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device="cpu") / rope.rotary_dim
    return _SCALINGS[rope.kind](1.0 / rope.theta**exponents_R, rope)


def _unscaled(inverse_R: Tensor, _rope: Rope) -> Tensor:
    return inverse_R


def _linear(inverse_R: Tensor, rope: Rope) -> Tensor:
    """Positions divided by the factor (arXiv 2306.15595)."""
    return inverse_R / rope.factor


def _llama3(inverse_R: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: waves that fit `high_freq_factor` times into the original context stay, long ones slow down."""
    times_R = rope.original_max_position * inverse_R / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep_R = ((times_R - rope.low_freq_factor) / span).clamp(0, 1)
    return keep_R * inverse_R + (1 - keep_R) * inverse_R / rope.factor


def _yarn(inverse_R: Tensor, rope: Rope) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over pairs between keeping and dividing by the factor."""

    def pair_that_turns(times: float) -> float:
        ratio = rope.original_max_position / (times * 2 * math.pi)
        return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001
    slow_R = ((torch.arange(len(inverse_R), dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return inverse_R / rope.factor * slow_R + inverse_R * (1 - slow_R)


_SCALINGS: dict[str, Callable[[Tensor, Rope], Tensor]] = {
    "default": _unscaled,
    "dynamic": _unscaled,  # differs only beyond the longest sequence that is admitted
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
