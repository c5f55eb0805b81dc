import numpy as np
import pytest
import torch
from gllm_kernels.step_inputs import (
    SlotState,
    StepRows,
    lay_out,
    lay_out_reference,
    lay_out_triton,
    set_blocks_reference,
    set_blocks_triton,
)

NUM_SLOTS, WIDTH, BLOCK_SIZE = 9, 300, 3


def state(rng, device):
    """Random rows; each slot has so many tokens that one more fits."""
    tables = torch.tensor(rng.permutation(NUM_SLOTS * WIDTH).reshape(NUM_SLOTS, WIDTH), dtype=torch.int32)
    lengths = torch.tensor(rng.integers(1, WIDTH * BLOCK_SIZE - 1, NUM_SLOTS), dtype=torch.int32)
    tokens = torch.tensor(rng.integers(0, 1000, NUM_SLOTS))
    return SlotState(tables.to(device), lengths.to(device), tokens.to(device))


def rows(device, slots, chunks, tokens):
    """Decodes of `slots`, then (slot, start, count) chunks."""
    counts = [1] * len(slots) + [count for *_, count in chunks]

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    return StepRows(
        ints([*slots, *(slot for slot, *_ in chunks)]),
        ints([0] * len(slots) + [start for _, start, _ in chunks]),
        ints(np.cumsum([0, *counts]).tolist()),
        ints(tokens),
        ints([len(slots)]),
        len(slots),
        len(chunks),
        sum(counts),
        max(counts),
        WIDTH,
    )


def expected(before, slots, chunks, tokens):
    """In plain Python, token by token."""
    tables, lengths, last = (each.tolist() for each in before)
    padding, made = NUM_SLOTS - 1, []
    given = iter(tokens)
    todo = [(slot, lengths[slot], 1, True) for slot in slots] + [(*chunk, False) for chunk in chunks]
    for slot, start, count, is_decode in todo:
        for position in range(start, start + count):
            token = last[slot] if is_decode else next(given)
            place = tables[slot][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            made.append((0, 0, -1) if slot == padding else (token, position, place))
    lens = [0 if slot == padding else start + count for slot, start, count, _ in todo]
    return (
        made,
        lens,
        [tables[slot] for slot, *_ in todo],
        {slot: end for (slot, *_), end in zip(todo, lens, strict=True)},
    )


@pytest.mark.parametrize("run", [lay_out_triton, lay_out_reference])
@pytest.mark.parametrize(
    ("slots", "chunks"),
    [
        ([3], []),
        ([], [(2, 0, 700)]),
        ([5, 0, 7], [(1, 4, 1), (6, 299, 600), (4, 0, 257)]),
        ([2, NUM_SLOTS - 1, NUM_SLOTS - 1], []),
    ],
)
def test_every_token_has_its_place(run, slots, chunks, device):
    rng = np.random.default_rng(len(slots))
    before = state(rng, device)
    after = SlotState(*(each.clone() for each in before))
    tokens = rng.integers(1, 1000, sum(count for *_, count in chunks)).tolist()
    found = run(after, rows(device, slots, chunks, tokens), block_size=BLOCK_SIZE)
    made, lens, tables, ends = expected(before, slots, chunks, tokens)
    assert list(zip(*(each.tolist() for each in found[:3]), strict=True)) == made
    assert found.kv_lens_S.tolist() == lens
    assert found.block_tables_SB.tolist() == tables
    for slot, (was, now) in enumerate(zip(before.lengths_N.tolist(), after.lengths_N.tolist(), strict=True)):
        assert now == ends.get(slot, was)


@pytest.mark.parametrize("run", [lay_out_triton, lay_out_reference])
@pytest.mark.parametrize("decoding", [[], [5, 0]])
def test_padding_is_nobody(run, decoding, device):
    """Rows of the padding slot at the end own the tokens that are left, as in a graph of a fixed size."""
    rng = np.random.default_rng(0)
    padding, num_tokens, chunk = NUM_SLOTS - 1, 400, (6, 30, 70)
    before = state(rng, device)
    exact, padded = (SlotState(*(each.clone() for each in before)) for _ in range(2))
    tokens = rng.integers(1, 1000, 70).tolist()
    few = rows(device, decoding, [chunk], tokens)
    starts = [*few.query_starts.tolist(), *[1 << 30] * 3]
    stale = few.prompt_tokens.new_full((num_tokens - len(tokens),), 77)
    many = few._replace(
        slots_S=torch.cat((few.slots_S, few.slots_S.new_full((3,), padding))),
        starts_S=torch.cat((few.starts_S, few.starts_S.new_full((3,), 9))),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        prompt_tokens=torch.cat((few.prompt_tokens, stale)),
        num_decodes=5,
        num_tokens=num_tokens,
        max_query_len=num_tokens,
    )
    expected, found = run(exact, few, block_size=BLOCK_SIZE), run(padded, many, block_size=BLOCK_SIZE)
    num_real, num_rows = few.num_tokens, len(few.slots_S)
    for name, of_padding in (("token_ids_T", 0), ("positions_T", 0), ("slot_mapping_T", -1)):
        mine, other = getattr(found, name), getattr(expected, name)
        assert mine[:num_real].tolist() == other.tolist()
        assert mine[num_real:].tolist() == [of_padding] * (num_tokens - num_real)
    assert found.kv_lens_S.tolist() == [*expected.kv_lens_S.tolist(), 0, 0, 0]
    assert found.block_tables_SB[:num_rows].tolist() == expected.block_tables_SB.tolist()
    assert padded.lengths_N[:padding].tolist() == exact.lengths_N[:padding].tolist()
    assert padded.lengths_N[padding] == 0


@pytest.mark.parametrize("run", [set_blocks_triton, set_blocks_reference])
def test_blocks_go_where_they_belong(run, device):
    rng = np.random.default_rng(1)
    tables = torch.zeros(NUM_SLOTS, WIDTH, dtype=torch.int32, device=device)
    places = rng.permutation(NUM_SLOTS * WIDTH)[:700]
    entries = np.stack((places // WIDTH, places % WIDTH, rng.integers(1, 10_000, 700)), axis=1)
    run(tables, torch.tensor(entries, dtype=torch.int32, device=device))
    truth = np.zeros((NUM_SLOTS, WIDTH), np.int32)
    truth[entries[:, 0], entries[:, 1]] = entries[:, 2]
    assert (tables.cpu().numpy() == truth).all()


def test_wrong_types_are_named(device):
    good = state(np.random.default_rng(0), device)
    some = rows(device, [1], [], [])
    with pytest.raises(ValueError, match="lengths are int32"):
        lay_out(good._replace(lengths_N=good.lengths_N.long()), some, block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match="one more query start"):
        lay_out(good, some._replace(query_starts=some.slots_S), block_size=BLOCK_SIZE)
