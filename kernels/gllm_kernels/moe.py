"""A layer of experts: each token visits the few that its router chose (arXiv 2101.03961, 2401.04088).

Shapes: T tokens, D hidden size, A experts chosen per token, X experts held here, I width of one (or of a slice).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gllm_kernels.silu_and_mul import silu_and_mul_reference

if TYPE_CHECKING:
    from torch import Tensor


def experts(
    x_TD: Tensor,
    gate_up_XID: Tensor,
    down_XDI: Tensor,
    weights_TA: Tensor,
    ids_TA: Tensor,
    *,
    first_expert: int,
) -> Tensor:
    """Sum over each token's chosen experts of weight * down(silu(gate) * up); those not held here add nothing.

    Args:
        x_TD: hidden states.
        gate_up_XID: each expert's gate rows, then its up rows ([X, 2I, D]).
        down_XDI: each expert's way back.
        weights_TA: float32 weight of each choice.
        ids_TA: int64 choices, counted over all experts of the layer.
        first_expert: the number of the first expert held here.
    """
    return experts_reference(x_TD, gate_up_XID, down_XDI, weights_TA, ids_TA, first_expert=first_expert)


def experts_reference(
    x_TD: Tensor, gate_up_XID: Tensor, down_XDI: Tensor, weights_TA: Tensor, ids_TA: Tensor, *, first_expert: int
) -> Tensor:
    """Plain torch: expert by expert, over the tokens that chose it; sums in float32."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(len(gate_up_XID)):
        token, choice = torch.where(ids_TA == first_expert + expert)
        if len(token):
            hidden_tI = silu_and_mul_reference(functional.linear(x_TD[token], gate_up_XID[expert]))
            y_tD = functional.linear(hidden_tI, down_XDI[expert]).float()
            out_TD.index_add_(0, token, y_tD * weights_TA[token, choice, None])
    return out_TD.to(x_TD.dtype)
