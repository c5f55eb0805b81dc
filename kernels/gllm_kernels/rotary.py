"""Rotary position embedding (arXiv 2104.09864): turns pairs of a head's dimensions by an angle per position.

Shapes: T tokens, H heads, E head dimension, R pairs that turn (2R <= E; the rest of a head passes unchanged).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rotary(q_THE: Tensor, k_TKE: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Turn queries and keys.

    Args:
        q_THE: queries.
        k_TKE: keys.
        cos_TR: float32 cosines of each token's angles.
        sin_TR: float32 sines.
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; else they are half the turning part apart.
    """
    return (
        rotary_reference(q_THE, cos_TR, sin_TR, interleaved=interleaved),
        rotary_reference(k_TKE, cos_TR, sin_TR, interleaved=interleaved),
    )


def rotary_reference(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Plain torch, for queries or keys."""
    num_pairs = cos_TR.shape[-1]
    turning, passing = x_THE[..., : 2 * num_pairs].float(), x_THE[..., 2 * num_pairs :]
    pairs = turning.reshape(*turning.shape[:-1], *((num_pairs, 2) if interleaved else (2, num_pairs)))
    x_THR, y_THR = pairs.unbind(-1 if interleaved else -2)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    turned = (x_THR * cos_T1R - y_THR * sin_T1R, y_THR * cos_T1R + x_THR * sin_T1R)
    joined = torch.stack(turned, -1 if interleaved else -2).flatten(-2).to(x_THE.dtype)
    return torch.cat((joined, passing), -1) if passing.shape[-1] else joined
