"""Root-mean-square norm (arXiv 1910.07467), alone or after adding to the residual.

Shapes: ... any leading dimensions, D the normed one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension, x / sqrt(mean(x²) + eps) * weight; computed in float32, returned in x's dtype."""
    return rms_norm_reference(x_D, weight_D, eps)


def add_rms_norm(x_D: Tensor, residual_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of x + residual, and that sum, which is the next residual."""
    return add_rms_norm_reference(x_D, residual_D, weight_D, eps)


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Plain torch."""
    wide_D = x_D.float()
    normed_D = wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_D.to(x_D.dtype)


def add_rms_norm_reference(x_D: Tensor, residual_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain torch."""
    sum_D = x_D + residual_D
    return rms_norm_reference(sum_D, weight_D, eps), sum_D
