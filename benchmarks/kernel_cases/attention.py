"""Attention over a paged cache in bf16, at the heads of Qwen3: decodes, prompts, and both in one micro-batch."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from gllm_kernels import chunk_attention, decode_attention
from gllm_kernels.decode_attention import decode_triton, plan_decode
from gllm_kernels.flash_attention import flash_attention, what_flash_lacks
from gllm_kernels.paged_attention import paged_attention

from kernel_cases.case import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kernel_cases.case import Work

DTYPE, HEAD_DIM, BLOCK_SIZE = torch.bfloat16, 128, 16


class Heads(NamedTuple):
    """What attention sees of a model."""

    name: str
    num_heads: int
    num_kv_heads: int


class Batch(NamedTuple):
    """Sequences as (keys, queries); those with one query come first."""

    name: str
    kv_lens: Sequence[int]
    query_lens: Sequence[int]
    num_common: int = 0  # first keys, which lie in the same blocks for all


class Inputs(NamedTuple):
    """One draw of a batch."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    tables: torch.Tensor

    def named_tables(self) -> dict[str, torch.Tensor]:
        """All but the first three, by the names that the operations give them."""
        return {"query_starts": self.query_starts, "kv_lens_S": self.kv_lens, "block_tables_SB": self.tables}


SMALL, MEDIUM, LARGE, MOE = Heads("0.6B", 16, 8), Heads("8B", 32, 8), Heads("32B", 64, 8), Heads("30B-A3B", 32, 4)
UNIFORM = [100 + 1948 * index // 255 for index in range(256)]
SHUFFLED = [UNIFORM[index * 97 % 256] for index in range(256)]
DECODES = (
    Batch("256 x 100..2048 keys", SHUFFLED, [1] * 256),
    Batch("256 x 600 keys", [600] * 256, [1] * 256),
    Batch("64 x 1150 keys", [1150] * 64, [1] * 64),
    Batch("8 x 8192 keys", [8192] * 8, [1] * 8),
    Batch("1 x 1000 keys", [1000], [1]),
    Batch("64 x 1150 keys, 512 in common", [1150] * 64, [1] * 64, 512),
    Batch("64 x 4096 keys, 3072 in common", [4096] * 64, [1] * 64, 3072),
)
CHUNKS = (
    Batch("8 x 2048 tokens", [2048] * 8, [2048] * 8),
    Batch("1 x 8192 tokens", [8192], [8192]),
    Batch("4 x 512 tokens after 1536", [2048] * 4, [512] * 4),
    Batch("1 x 64 tokens after 8192", [8256], [64]),
    Batch("1 x 256 tokens after 32768", [33024], [256]),
    Batch("1 x 2167 tokens after 4990", [7157], [2167]),
    Batch("46 tokens after 4033, prompts of 1149 and 822", [4079, 1149, 822], [46, 1149, 822]),
)
MIXED = Batch("128 decodes of 1000, 2 x 960 tokens", [1000] * 128 + [960] * 2, [1] * 128 + [960] * 2)

DECODE_SETTINGS = [
    decode_attention.Tuning(*each)
    for each in (
        (64, 4, 3, 3), (64, 4, 3, 2), (64, 4, 4, 2), (64, 8, 3, 2), (64, 2, 3, 3),
        (32, 4, 3, 4), (32, 4, 4, 4), (32, 4, 4, 3), (32, 4, 5, 3), (32, 2, 4, 4), (32, 2, 3, 5), (128, 4, 2, 2),
    )
]  # fmt: skip
CHUNK_SETTINGS = [
    chunk_attention.Tuning(*each)
    for each in ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2))
]


def draw(heads: Heads, batch: Batch) -> Inputs:
    """Random queries, keys and values; every sequence's blocks lie anywhere."""
    random = partial(torch.randn, device="cuda", dtype=DTYPE)
    counts = [-(-length // BLOCK_SIZE) for length in batch.kv_lens]
    blocks = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    cache_shape = (sum(counts), BLOCK_SIZE, heads.num_kv_heads, HEAD_DIM)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    num_common = batch.num_common // BLOCK_SIZE
    tables[:, :num_common] = tables[0, :num_common].clone()
    return Inputs(
        random(sum(batch.query_lens), heads.num_heads, HEAD_DIM),
        random(cache_shape),
        random(cache_shape),
        torch.tensor([0, *batch.query_lens]).cumsum(0).int().cuda(),
        torch.tensor(batch.kv_lens, dtype=torch.int32, device="cuda"),
        tables.cuda(),
    )


def plan_of(
    heads: Heads, kv_lens: torch.Tensor, tuning: decode_attention.Tuning | None = None
) -> decode_attention.DecodePlan:
    """A plan, as a step makes one for all its layers."""
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads
    return plan_decode(
        kv_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, dtype=DTYPE, tuning=tuning
    )


def chunk_plan_of(
    heads: Heads, inputs: Inputs, num_decodes: int, tuning: chunk_attention.Tuning | None = None
) -> chunk_attention.ChunkPlan:
    """A plan of what follows so many decodes, as a step makes one for all its layers."""
    return chunk_attention.plan_chunks(
        inputs.query_starts,
        inputs.kv_lens,
        torch.full((1,), num_decodes, dtype=torch.int32, device="cuda"),
        max_tokens=len(inputs.q) - num_decodes,
        max_chunks=len(inputs.kv_lens) - num_decodes,
        group_size=heads.num_heads // heads.num_kv_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        tuning=tuning,
    )


def plan_works(batch: Batch, copies: int) -> list[Work]:
    """The plan alone."""
    kv_lens = [torch.tensor(batch.kv_lens, dtype=torch.int32, device="cuda") for _ in range(copies)]
    return [partial(plan_of, MEDIUM, each) for each in kv_lens]


def decode_works(
    heads: Heads, batch: Batch, copies: int, *, tuning: decode_attention.Tuning | None = None
) -> list[Work]:
    """One call for each draw of the cache."""

    def work() -> Work:
        q, keys, values, _, kv_lens, tables = draw(heads, batch)
        out, plan = torch.empty_like(q), plan_of(heads, kv_lens, tuning)
        return lambda: decode_triton(out, q, keys, values, kv_lens, tables, plan=plan, scale=HEAD_DIM**-0.5)

    return [work() for _ in range(copies)]


def chunk_works(heads: Heads, batch: Batch, copies: int, *, tuning: chunk_attention.Tuning | None = None) -> list[Work]:
    """One call for each draw of the cache."""

    def work() -> Work:
        inputs = draw(heads, batch)
        out, plan = torch.empty_like(inputs.q), chunk_plan_of(heads, inputs, 0, tuning)
        return lambda: chunk_attention.chunk_triton(out, *inputs, plan=plan, scale=HEAD_DIM**-0.5)

    return [work() for _ in range(copies)]


def mixed_works(heads: Heads, batch: Batch, copies: int, *, backend: str) -> list[Work]:
    """One call of the front door for each draw of the cache."""

    def work() -> Work:
        inputs, num_decodes = draw(heads, batch), batch.query_lens.count(1)
        plan, chunk_plan = plan_of(heads, inputs.kv_lens[:num_decodes]), chunk_plan_of(heads, inputs, num_decodes)
        return lambda: paged_attention(
            *inputs[:3],
            **inputs.named_tables(),
            num_decodes=num_decodes,
            max_query_len=max(batch.query_lens),
            max_kv_len=max(batch.kv_lens),
            scale=HEAD_DIM**-0.5,
            decode_plan=plan,
            chunk_plan=chunk_plan,
            backend=backend,
        )

    return [work() for _ in range(copies)]


def flash_works(heads: Heads, batch: Batch, copies: int) -> list[Work]:
    """One call of flash-attn for each draw of the cache, decodes as chunks of one token."""

    def work() -> Work:
        inputs = draw(heads, batch)
        return lambda: flash_attention(
            *inputs[:3], **inputs.named_tables(), max_query_len=max(batch.query_lens), scale=HEAD_DIM**-0.5
        )

    return [work() for _ in range(copies)]


def flash_rival(heads: Heads, batch: Batch) -> Mapping[str, Callable[[int], list[Work]]]:
    """flash-attn where it is installed."""
    device = torch.device("cuda", torch.cuda.current_device())
    lacks = what_flash_lacks(device=device, dtype=DTYPE, head_dim=HEAD_DIM, block_size=BLOCK_SIZE)
    return {} if lacks else {"flash-attn": partial(flash_works, heads, batch)}


def case(
    op: str, heads: Heads, batch: Batch, make: Callable[..., list[Work]], settings: str = "", **options: object
) -> Case:
    """Keys and values of each sequence, queries and outputs, each moved once; products of what causality lets see."""
    num_seen = sum(
        query_len * (kv_len - query_len) + query_len * (query_len + 1) // 2
        for kv_len, query_len in zip(batch.kv_lens, batch.query_lens, strict=True)
    )
    num_rows = sum(batch.kv_lens) * heads.num_kv_heads + sum(batch.query_lens) * heads.num_heads
    return Case(
        op=op,
        size=f"{heads.name}, {batch.name}{settings}",
        make=partial(make, heads, batch, **options),
        num_bytes=2 * num_rows * HEAD_DIM * DTYPE.itemsize,
        num_flops=4 * num_seen * heads.num_heads * HEAD_DIM,
        rivals={} if settings else flash_rival(heads, batch),
    )


def cases() -> list[Case]:
    """The kernels as they are used."""
    plans = [
        Case(op="plan_decode", size=batch.name, make=partial(plan_works, batch), num_bytes=8 * len(batch.kv_lens))
        for batch in DECODES
    ]
    decodes = [
        case("decode_attention", heads, batch, decode_works)
        for heads, batch in product((SMALL, MEDIUM, LARGE, MOE), DECODES)
    ]
    chunks = [
        case("chunk_attention", heads, batch, chunk_works) for heads, batch in product((SMALL, MEDIUM, LARGE), CHUNKS)
    ]
    mixed = [case("paged_attention", heads, MIXED, mixed_works, backend="triton") for heads in (SMALL, MEDIUM, LARGE)]
    return plans + decodes + chunks + mixed


def sweep() -> list[Case]:
    """The kernels with other settings."""
    decodes = [
        case("decode_attention", heads, batch, decode_works, f", {'/'.join(map(str, tuning))}", tuning=tuning)
        for heads, batch, tuning in product((SMALL, LARGE, MOE), DECODES, DECODE_SETTINGS)
    ]
    chunks = [
        case("chunk_attention", heads, batch, chunk_works, f", {'/'.join(map(str, tuning))}", tuning=tuning)
        for heads, batch, tuning in product((SMALL, LARGE), CHUNKS, CHUNK_SETTINGS)
    ]
    return decodes + chunks
