"""All that lies between the projection of queries, keys and values and attention, in one pass over them.

Each head of q and k is normed (in the models that do), then turned by its token's angles (rotary embedding, arXiv
2104.09864); k and v go to the paged cache.

Shapes: T tokens, H query heads, K KV heads, E head dimension, C = (H + 2K) * E channels, R pairs of a head's
dimensions that turn (2R <= E, the rest passes), N blocks of the cache, P tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gllm_kernels.early_start import await_previous, launch_options, let_next_start
from gllm_kernels.jit import next_power_of_2, runs_triton, tl, triton
from gllm_kernels.rms_norm import rms_norm_reference

if TYPE_CHECKING:
    from torch import Tensor

FEW_TOKENS = 1024  # up to here few heads to a program, so that there are programs enough
FEW_HEADS, MANY_HEADS = 4, 16
ELEMENTS_PER_THREAD = 16


def norm_rotate_cache(
    qkv_TC: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    slots_T: Tensor,
    *,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """Norm and turn queries and keys, put keys and values into the cache.

    Args:
        qkv_TC: all query heads, then all key heads, then all value heads of each token.
        q_weight_E: weight of the norm of each query head; None: q and k are not normed.
        k_weight_E: the same of each key head; both or neither.
        cos_TR: float32 cosines of each token's angles.
        sin_TR: float32 sines.
        keys_NPKE: written.
        values_NPKE: written.
        slots_T: int64, block * P + offset where a token's key and value go; below zero: nowhere (padding).
        eps: of the norms.
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; else they are R dimensions apart.

    Returns:
        The queries [T, H, E].

    Raises:
        ValueError: shapes or dtypes do not fit one another, or something is not contiguous.
    """
    _check_heads(qkv_TC, q_weight_E, k_weight_E, keys_NPKE)
    _check_places(qkv_TC, cos_TR, sin_TR, keys_NPKE, values_NPKE, slots_T)
    arguments = (qkv_TC, q_weight_E, k_weight_E, cos_TR, sin_TR, keys_NPKE, values_NPKE, slots_T)
    run = norm_rotate_cache_triton if runs_triton(qkv_TC) else norm_rotate_cache_reference
    return run(*arguments, eps=eps, interleaved=interleaved)


def norm_rotate_cache_reference(
    qkv_TC: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    slots_T: Tensor,
    *,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """Plain torch, step by step."""
    num_kv_heads, head_dim = keys_NPKE.shape[2:]
    heads_TXE = qkv_TC.view(len(qkv_TC), -1, head_dim)
    num_heads = heads_TXE.shape[1] - 2 * num_kv_heads
    q_THE, k_TKE, v_TKE = heads_TXE.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight_E is not None and k_weight_E is not None:
        q_THE, k_TKE = rms_norm_reference(q_THE, q_weight_E, eps), rms_norm_reference(k_TKE, k_weight_E, eps)
    _write(_rotate(k_TKE, cos_TR, sin_TR, interleaved=interleaved), keys_NPKE, slots_T)
    _write(v_TKE, values_NPKE, slots_T)
    return _rotate(q_THE, cos_TR, sin_TR, interleaved=interleaved).contiguous()


def _rotate(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first 2R dimensions of each head, in float32."""
    num_pairs = cos_TR.shape[-1]
    turning, passing = x_THE[..., : 2 * num_pairs].float(), x_THE[..., 2 * num_pairs :]
    pairs = turning.reshape(*turning.shape[:-1], *((num_pairs, 2) if interleaved else (2, num_pairs)))
    x_THR, y_THR = pairs.unbind(-1 if interleaved else -2)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    turned = (x_THR * cos_T1R - y_THR * sin_T1R, y_THR * cos_T1R + x_THR * sin_T1R)
    joined = torch.stack(turned, -1 if interleaved else -2).flatten(-2).to(x_THE.dtype)
    return torch.cat((joined, passing), -1) if passing.shape[-1] else joined


def _write(x_TKE: Tensor, cache_NPKE: Tensor, slots_T: Tensor) -> None:
    """Put rows in their slots. A row without one does what the first row that has one does, to the same effect."""
    cache_sKE = cache_NPKE.view(-1, *cache_NPKE.shape[2:])
    has_slot_T = slots_T >= 0
    first = has_slot_T.to(torch.uint8).argmax()
    source_T = torch.where(has_slot_T, torch.arange(len(slots_T), device=slots_T.device), first)
    target_T = slots_T[source_T].clamp(min=0)
    x_TKE = torch.where(has_slot_T.any(), x_TKE[source_T].to(cache_sKE.dtype), cache_sKE[target_T])
    cache_sKE.index_copy_(0, target_T, x_TKE)


def norm_rotate_cache_triton(
    qkv_TC: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    keys_NPKE: Tensor,
    values_NPKE: Tensor,
    slots_T: Tensor,
    *,
    eps: float,
    interleaved: bool,
    heads_per_program: int | None = None,
    elements_per_thread: int = ELEMENTS_PER_THREAD,
) -> Tensor:
    """The kernel; `heads_per_program` is a power of two (default: by the number of tokens)."""
    num_tokens, (num_kv_heads, head_dim) = len(qkv_TC), keys_NPKE.shape[2:]
    num_heads, num_pairs = qkv_TC.shape[1] // head_dim - 2 * num_kv_heads, cos_TR.shape[1]
    tile = heads_per_program or (FEW_HEADS if num_tokens <= FEW_TOKENS else MANY_HEADS)
    q_THE = qkv_TC.new_empty((num_tokens, num_heads, head_dim))
    _norm_rotate_cache_kernel[(num_tokens, -(-num_heads // tile) - (-num_kv_heads // tile))](
        qkv_TC,
        q_weight_E,
        k_weight_E,
        cos_TR,
        sin_TR,
        q_THE,
        keys_NPKE,
        values_NPKE,
        slots_T,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        NUM_PAIRS=num_pairs,
        TILE=tile,
        BLOCK_PAIRS=next_power_of_2(num_pairs),
        BLOCK_REST=next_power_of_2(head_dim - 2 * num_pairs),
        BLOCK_DIM=next_power_of_2(head_dim),
        INTERLEAVED=interleaved,
        **launch_options(),
        num_warps=min(max(tile * next_power_of_2(head_dim) // (32 * elements_per_thread), 1), 8),
    )
    return q_THE


def _check_heads(qkv_TC: Tensor, q_weight_E: Tensor | None, k_weight_E: Tensor | None, keys_NPKE: Tensor) -> None:
    num_channels, (num_kv_heads, head_dim) = qkv_TC.shape[1], keys_NPKE.shape[2:]
    if num_channels % head_dim or num_channels <= 2 * num_kv_heads * head_dim:
        raise ValueError(
            f"{num_channels} channels do not hold query heads and {num_kv_heads} key and value heads of {head_dim}"
        )
    if (q_weight_E is None) != (k_weight_E is None):
        raise ValueError("queries and keys are both normed or neither")
    for weight_E in (q_weight_E, k_weight_E):
        if weight_E is not None and (weight_E.shape != (head_dim,) or weight_E.dtype != qkv_TC.dtype):
            raise ValueError(
                f"a norm's weight must be {qkv_TC.dtype} [{head_dim}], not {weight_E.dtype} {list(weight_E.shape)}"
            )


def _check_places(
    qkv_TC: Tensor, cos_TR: Tensor, sin_TR: Tensor, keys_NPKE: Tensor, values_NPKE: Tensor, slots_T: Tensor
) -> None:
    num_tokens, most = len(qkv_TC), keys_NPKE.shape[3] // 2
    if cos_TR.shape != sin_TR.shape or len(cos_TR) != num_tokens or not 0 < cos_TR.shape[1] <= most:
        raise ValueError(
            f"cosines {list(cos_TR.shape)} and sines {list(sin_TR.shape)} must be [{num_tokens}, 1 to {most}]"
        )
    if cos_TR.dtype != torch.float32 or sin_TR.dtype != torch.float32:
        raise ValueError(f"cosines and sines must be float32, not {cos_TR.dtype} and {sin_TR.dtype}")
    if keys_NPKE.shape != values_NPKE.shape or keys_NPKE.dtype != values_NPKE.dtype:
        raise ValueError("the caches of keys and values must be of one shape and dtype")
    if slots_T.shape != (num_tokens,) or slots_T.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [{num_tokens}], not {slots_T.dtype} {list(slots_T.shape)}")
    for each in (qkv_TC, cos_TR, sin_TR, keys_NPKE, values_NPKE, slots_T):
        if not each.is_contiguous():
            raise ValueError(f"all tensors must be contiguous, but one {list(each.shape)} has strides {each.stride()}")


@triton.jit
def _norm_rotate_cache_kernel(
    qkv_TC,
    q_weight_E,
    k_weight_E,
    cos_TR,
    sin_TR,
    q_THE,
    keys_NPKE,
    values_NPKE,
    slots_T,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program takes up to TILE heads of a token: of its queries, or keys together with their values."""
    let_next_start(EARLY)
    await_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    num_query_tiles: tl.constexpr = (NUM_HEADS + TILE - 1) // TILE
    qkv_at = qkv_TC + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    cos_R, sin_R = cos_TR + token * NUM_PAIRS, sin_TR + token * NUM_PAIRS
    if tl.program_id(1) < num_query_tiles:
        heads = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
        _norm_rotate(
            qkv_at, q_THE + token * (NUM_HEADS * HEAD_DIM), heads, heads < NUM_HEADS, q_weight_E, cos_R, sin_R, eps,
            HEAD_DIM, NUM_PAIRS, BLOCK_PAIRS, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        slot = tl.load(slots_T + token)
        if slot >= 0:
            heads = (tl.program_id(1) - num_query_tiles) * TILE + tl.arange(0, TILE)[:, None]
            keys_at, cached = qkv_at + NUM_HEADS * HEAD_DIM, slot * (NUM_KV_HEADS * HEAD_DIM)
            columns = tl.arange(0, BLOCK_DIM)[None, :]
            held = (heads < NUM_KV_HEADS) & (columns < HEAD_DIM)
            # Asked for before the keys are worked on, so that one wait serves both.
            values = tl.load(keys_at + NUM_KV_HEADS * HEAD_DIM + heads * HEAD_DIM + columns, mask=held)
            _norm_rotate(
                keys_at, keys_NPKE + cached, heads, heads < NUM_KV_HEADS, k_weight_E, cos_R, sin_R, eps,
                HEAD_DIM, NUM_PAIRS, BLOCK_PAIRS, BLOCK_REST, INTERLEAVED,
            )  # fmt: skip
            tl.store(values_NPKE + cached + heads * HEAD_DIM + columns, values, mask=held)


@triton.jit
def _norm_rotate(
    source,
    target,
    heads,
    held,
    weight_E,
    cos_R,
    sin_R,
    eps,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Norm and turn heads [TILE, 1] of a token from one place to another."""
    has_rest: tl.constexpr = 2 * NUM_PAIRS < HEAD_DIM
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    rest = 2 * NUM_PAIRS + tl.arange(0, BLOCK_REST)[None, :]
    rest_held = held & (rest < HEAD_DIM)
    x, y = _load_pairs(source + heads * HEAD_DIM, held, NUM_PAIRS, BLOCK_PAIRS, INTERLEAVED)
    # One copy for each head: in the layout of x, so that nothing has to move between threads.
    turns = held & (pairs < NUM_PAIRS)
    cos = tl.load(cos_R + heads * 0 + pairs, mask=turns, other=0.0)
    sin = tl.load(sin_R + heads * 0 + pairs, mask=turns, other=0.0)
    if has_rest:
        z = tl.load(source + heads * HEAD_DIM + rest, mask=rest_held, other=0.0)
    if weight_E is not None:
        x_weight, y_weight = _load_pairs(weight_E + heads * 0, held, NUM_PAIRS, BLOCK_PAIRS, INTERLEAVED)
        squares = _sum_of_squares(x) + _sum_of_squares(y)
        if has_rest:
            squares += _sum_of_squares(z)
        scale = tl.math.rsqrt(squares / HEAD_DIM + eps)
        x, y = _scale(x, scale, x_weight), _scale(y, scale, y_weight)
        if has_rest:
            z = _scale(z, scale, tl.load(weight_E + heads * 0 + rest, mask=rest_held, other=0.0))
    dtype = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    _store_pairs(
        target + heads * HEAD_DIM, (x * cos - y * sin).to(dtype), (y * cos + x * sin).to(dtype), held,
        NUM_PAIRS, BLOCK_PAIRS, INTERLEAVED,
    )  # fmt: skip
    if has_rest:
        tl.store(target + heads * HEAD_DIM + rest, z, mask=rest_held)


@triton.jit
def _sum_of_squares(x):
    """Of each row, float32 [TILE, 1]."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1, keep_dims=True)


@triton.jit
def _scale(x, scale, weight):
    """What the norm makes of x: rounded to its dtype before the weight multiplies it, and after."""
    normed = (x.to(tl.float32) * scale).to(x.dtype)
    return (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype)


@triton.jit
def _load_pairs(start, held, NUM_PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second elements [TILE, BLOCK_PAIRS] of the pairs of rows that start at these addresses [TILE, 1]."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        both = tl.load(start + columns, mask=held & (columns < 2 * NUM_PAIRS), other=0.0)
        x, y = tl.split(tl.reshape(both, (both.shape[0], BLOCK_PAIRS, 2)))
    else:
        columns = tl.arange(0, BLOCK_PAIRS)[None, :]
        mask = held & (columns < NUM_PAIRS)
        x = tl.load(start + columns, mask=mask, other=0.0)
        y = tl.load(start + NUM_PAIRS + columns, mask=mask, other=0.0)
    return x, y


@triton.jit
def _store_pairs(start, x, y, held, NUM_PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The way back."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        both = tl.reshape(tl.join(x, y), (x.shape[0], 2 * BLOCK_PAIRS))
        tl.store(start + columns, both, mask=held & (columns < 2 * NUM_PAIRS))
    else:
        columns = tl.arange(0, BLOCK_PAIRS)[None, :]
        mask = held & (columns < NUM_PAIRS)
        tl.store(start + columns, x, mask=mask)
        tl.store(start + NUM_PAIRS + columns, y, mask=mask)
