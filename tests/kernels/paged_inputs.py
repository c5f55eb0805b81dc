"""Sequences in shuffled blocks of a cache that is NaN wherever no sequence has a key, and what attention gives."""

from dataclasses import dataclass

import torch

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter multiplies no bfloat16 matrices
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass
class Paged:
    """A micro-batch: queries, a layer's cache, and the tables."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    tables: torch.Tensor
    query_lens: list[int]
    scale: float

    @property
    def tensors(self):
        return self.q, self.keys, self.values

    def poisoned(self):
        return torch.full_like(self.q, float("nan"))


def draw(kv_lens, query_lens, *, page, heads, group, width, dtype, device, seed=0):
    """Random inputs; the rows of the tables are wider than needed and padded with other sequences' blocks."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in kv_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.randint(num_blocks, (len(kv_lens), max(counts) + 2), generator=generator, dtype=torch.int32)
    keys, values = (torch.full((num_blocks * page, heads, width), float("nan")) for _ in range(2))
    for row, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        tables[row, :count] = blocks
        slots = (blocks[:, None] * page + torch.arange(page)).flatten()[:length]
        keys[slots] = torch.randn(length, heads, width, generator=generator)
        values[slots] = torch.randn(length, heads, width, generator=generator)
    q = torch.randn(sum(query_lens), heads * group, width, generator=generator)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cache_shape = (num_blocks, page, heads, width)
    return Paged(
        q=q.to(device, dtype),
        keys=keys.view(cache_shape).to(device, dtype),
        values=values.view(cache_shape).to(device, dtype),
        query_starts=starts.to(device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        tables=tables.to(device),
        query_lens=list(query_lens),
        scale=width**-0.5,
    )


def truth(inputs):
    """One sequence and one head after another in float64; zeros for a sequence without keys."""
    q, keys, values = (each.double() for each in inputs.tensors)
    out = torch.zeros_like(q)
    group = q.shape[1] // keys.shape[2]
    for row, kv_len in enumerate(inputs.kv_lens.tolist()):
        start, end = inputs.query_starts[row], inputs.query_starts[row + 1]
        if not kv_len:
            continue
        blocks = inputs.tables[row, : -(-kv_len // keys.shape[1])].long()
        k, v = (each[blocks].flatten(0, 1)[:kv_len] for each in (keys, values))
        last_seen = torch.arange(kv_len - (end - start), kv_len, device=q.device)
        hidden = torch.arange(kv_len, device=q.device)[None] > last_seen[:, None]
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[:, head // group].T * inputs.scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[start:end, head] = weights @ v[:, head // group]
    return out


def error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()
