"""Put a micro-batch's keys and values into the paged cache.

Shapes: T tokens, K KV heads, E head dimension, N blocks, P tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_kv(k_TKE: Tensor, v_TKE: Tensor, keys_NPKE: Tensor, values_NPKE: Tensor, slots_T: Tensor) -> None:
    """Write token t's key and value into slot `slots_T[t]` (block * P + offset), in place."""
    write_kv_reference(k_TKE, v_TKE, keys_NPKE, values_NPKE, slots_T)


def write_kv_reference(k_TKE: Tensor, v_TKE: Tensor, keys_NPKE: Tensor, values_NPKE: Tensor, slots_T: Tensor) -> None:
    """Plain torch."""
    keys_NPKE.view(-1, *keys_NPKE.shape[2:]).index_copy_(0, slots_T, k_TKE.to(keys_NPKE.dtype))
    values_NPKE.view(-1, *values_NPKE.shape[2:]).index_copy_(0, slots_T, v_TKE.to(values_NPKE.dtype))
