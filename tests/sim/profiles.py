"""A profile of a machine whose times follow from formulas, and what these formulas say of a step."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import fsum

from gllm.model_shape import load_shape
from gllm.sim.cost import batch_work
from gllm.sim.profile import read_profile

MODEL = "qwen3-0.6b"
SHAPE = load_shape(MODEL)  # 28 layers
BASE_CONTEXT = 16
GRAPHS = [1, 2, 4, 8, 16, 32, 64]
TOKEN_GRAPHS = [16, 32, 64, 128]
BATCHES = [1, 2, 8, 32, 64]
CONTEXTS = [BASE_CONTEXT, 256, 1024, 4096]
MIXED_CONTEXTS = [BASE_CONTEXT, 1024]
TOKENS = [*TOKEN_GRAPHS, 129, 160, 256, 512, 1024]  # 160: where the floor of what is beyond graphs ends
QUERIES = [16, 64, 256, 1024]
STARTS = [0, 512, 2048]
ROWS = [1, 8, 64]
DECODE_GAP, CHUNKED_GAP, DISPATCH, RETURN = 700, 900, 11_000, 22_000


def decode(n):
    return max(400_000, 392_000 + 1000 * n)


def tokens(num):
    if num > TOKEN_GRAPHS[-1]:
        return max(1_200_000, 400_000 + 5000 * num)
    return 300_000 + 5000 * padded(num, TOKEN_GRAPHS)


def decode_attention(n, context):
    return 3 * n * (context - BASE_CONTEXT)


def mixed(n, context):
    beyond = min(context, MIXED_CONTEXTS[-1]) - BASE_CONTEXT
    return (250 + beyond) * n - 2000  # a little less than nothing for few


def one(query, start):
    return 4 * query * start + 80 * (query - 64)


def each(query, start):
    return 3 * query * start + 40 * (query - 64)


def head(rows):
    return 10_000 + 100 * rows


def graph_head(rows):
    return 5000 + 100 * rows


def transfer(num_tokens):
    return 2000 + 3 * num_tokens


def padded(n, sizes=GRAPHS):
    return next(size for size in sizes if size >= n)


def sampled(rows):
    """The head of a step with chunks."""
    if not rows:
        return 0
    return head(rows) if rows > GRAPHS[-1] else graph_head(padded(rows))


def stamped(chunks=(), contexts=(), *, num_sampled, graphs=True):
    """Layers and head of a whole step, as formulas have it."""
    n, mean = len(contexts), fsum(contexts) / max(len(contexts), 1)
    if not chunks:
        size = padded(n) if graphs else n
        return decode(size) + decode_attention(n, mean), graph_head(size) if graphs else head(num_sampled)
    num_tokens = sum(query for _, query in chunks) + n
    layers = tokens(num_tokens) + (mixed(n, mean) + decode_attention(n, mean) if n else 0)
    alone = max(one(query, start) for start, query in chunks)
    together = sum(each(query, start) for start, query in chunks)
    return layers + (alone if len(chunks) == 1 else max(alone, together)), sampled(num_sampled)


def table(formula, rows, columns, nulls=()):
    """One list a row; None at the `nulls`, given as pairs."""
    return [[None if (row, column) in nulls else formula(row, column) for column in columns] for row in rows]


def contents(**changes):
    """What the profile's file holds; `changes` are laid over its top."""
    values = {
        "format": "gllm-profile",
        "version": 1,
        "model": MODEL,
        "model_shape": {**asdict(SHAPE), "name": "the-same-by-another-name"},
        "gpu": "h200",
        "device": "NVIDIA H200",
        "parallel": {"pp": 1, "tp": 1, "ep": 1},
        "dtype": "bfloat16",
        "block_size": 16,
        "attention_backend": "triton",
        "layers": SHAPE.num_layers,
        "num_blocks": 40_960,
        "made": {"date": "2026-11-22", "command": "by formula", "seconds": 0, "versions": {}},
        "base_chunk": 64,
        "max_tokens": TOKENS[-1],
        "graph_sizes": GRAPHS,
        "token_graph_sizes": TOKEN_GRAPHS,
        "decode": {"batches": GRAPHS, "ns": [decode(n) for n in GRAPHS]},
        "decode_attention": {
            "batches": BATCHES,
            "contexts": CONTEXTS,
            "ns": table(decode_attention, BATCHES, CONTEXTS, nulls=[(64, 4096)]),
        },
        "tokens": {"tokens": TOKENS, "ns": [tokens(num) for num in TOKENS]},
        "mixed": {"batches": BATCHES, "contexts": MIXED_CONTEXTS, "ns": table(mixed, BATCHES, MIXED_CONTEXTS)},
        "prefill_attention": {
            "queries": QUERIES,
            "starts": STARTS,
            "one_ns": table(one, QUERIES, STARTS),
            "each_ns": table(each, QUERIES, STARTS, nulls=[(256, 2048), (1024, 2048)]),
        },
        "head": {"rows": ROWS, "ns": [head(rows) for rows in ROWS]},
        "graph_head": {"rows": GRAPHS, "ns": [graph_head(rows) for rows in GRAPHS]},
        "gap": {"decode_ns": DECODE_GAP, "chunked_ns": CHUNKED_GAP},
        "transfer": None,
        "host": {"dispatch_ns": DISPATCH, "return_ns": RETURN},
        "checks": [
            {"chunks": [[0, 100], [512, 64]], "contexts": [300, 40], "num_sampled": 3, "stage_ns": [1_000_000]},
            {"chunks": [], "contexts": [700], "num_sampled": 1, "stage_ns": [400_000]},
        ],
    }
    return values | changes


CHUNK_KERNEL = {  # on a card of few multiprocessors: a base chunk fills half of it
    "rows": 128,
    "tile": 64,
    "least_tiles": 4,
    "places": 8,
    "kv_heads": 8,
    "group_size": 2,
    "multiprocessors": 16,
}
CLOCK = {"tau_ns": 2_000_000, "slowdown": 0.2, "knee": 0.3, "attention": 0.5}  # as older files have it
SIZED_CLOCK = {
    "limits": [
        {"tau_ns": 2_000_000, "slowdown": 0.2, "knee": 0.3},
        {"tau_ns": 40_000_000, "slowdown": 0.05, "knee": 0.6},
    ],
    "tokens": [64, 256, 1024],
    "power": [1.5, 0.7, 1],
    "prefill": 0.6,
    "decode": 1.2,
    "attention": 0.5,
}


def two_stages(**changes):
    """The same, made with two stages."""
    stages = {"parallel": {"pp": 2, "tp": 1, "ep": 1}, "checks": []}
    points = [1, 64, 1024]
    return contents(**stages, transfer={"tokens": points, "ns": [transfer(num) for num in points]}, **changes)


def written(folder, values=None, name="formula"):
    """The path of a file with these contents."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(contents() if values is None else values))
    return path


def profile(folder, values=None, name="formula"):
    return read_profile(written(folder, values, name))


def step(chunks=(), contexts=(), num_sampled=None):
    return batch_work(chunks=chunks, contexts=contexts, num_sampled=num_sampled)
