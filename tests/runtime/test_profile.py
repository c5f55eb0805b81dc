"""`profile`: tables recover what steps cost, from workers whose times are known; real ones give a whole file."""

import json
import math
from array import array
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from gllm_kernels import chunk_plan
from runtime.servers import Command, until
from runtime.tiny_models import make
from sim.profiles import CHUNK_KERNEL, SHAPE, contents

from gllm.chunk_schedule import MOST_EACH, ChunkKernel
from gllm.core import Limits
from gllm.gpu_clock import GpuClock, PowerLimit, StageClock
from gllm.graph_sizes import MAX_CHUNKS
from gllm.runtime import process
from gllm.runtime.cli import main
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.messages import StageTime, StepDone, WorkerReady, decode_order, decode_report, encode
from gllm.runtime.profile import clock as clock_module
from gllm.runtime.profile import command, host, profiler
from gllm.runtime.profile.clock_fit import fit
from gllm.runtime.profile.command import gist
from gllm.runtime.profile.grids import BASE_CHUNK, Room, make_grid, random_mixes
from gllm.runtime.profile.host import host_times
from gllm.runtime.profile.measure import measure
from gllm.runtime.profile.session import Session
from gllm.runtime.profile.steps import DRIFT, MAX_REPEATS, Mix, StepMaker, prompts, uneven_decodes
from gllm.runtime.worker import worker
from gllm.sim.cost import batch_work
from gllm.sim.gpus import get_gpu
from gllm.sim.profile import read_profile
from gllm.sim.profiled import Profiled

FIRST_PLAN = 7
VOCAB_SIZE = 50


def tokens_ns(num_tokens, sizes, *, skips_padding=False):
    """A host's pace at least, outside of graphs."""
    captured = next((size for size in sizes if size >= num_tokens), None)
    if captured is None:
        return 20_000 * max(num_tokens, 192)
    return 18_000 * captured - skips_padding * 11_000 * (captured - num_tokens)


def one_ns(start, num_tokens):
    """Attention of one chunk beyond what base chunks have."""
    return 7 * num_tokens * start + 4 * num_tokens * max(0, num_tokens - BASE_CHUNK)


def prefill_ns(chunks):
    """Chunks beside each other keep each other's units busy."""
    return sum(one_ns(*chunk) // (1 + (len(chunks) > 1)) for chunk in chunks)


def decode_ns(num, sizes, *, skips_padding=False):
    captured = next((size for size in sizes if size >= num), num)
    return 500_000 + 9_000 * captured - skips_padding * 5_000 * (captured - num)


def decode_attention_ns(contexts):
    return 11 * (sum(contexts) - 16 * len(contexts))


def mixed_ns(contexts):
    """Beside chunks decodes take more, and the more the longer their contexts."""
    return 30_000 + 4_000 * len(contexts) + decode_attention_ns(contexts) if contexts else 0


def beside_ns(num_tokens, contexts):
    """Of prompts, more than of one base chunk, that lose what decodes drive out of a cache for 16 Ki tokens' keys."""
    return 40 * max(0, num_tokens - BASE_CHUNK) * min(sum(contexts), 16 << 10) >> 14


def head_ns(rows):
    return 200_000 + 1_000 * rows if rows else 0


def graph_head_ns(num, sizes):
    captured = next((size for size in sizes if size >= num), None)
    return head_ns(num) if captured is None or not num else 100_000 + 700 * captured


def transfer_ns(num_tokens):
    return 50_000 + 13 * num_tokens


GAPS_NS = {"decode_ns": 40_000, "chunked_ns": 90_000}


class FakeWorkers:
    """Stages whose times follow the formulas above. They check what every step says of slots and blocks."""

    def __init__(self, room, token_graph_sizes=()):
        self.room, self.limits, self.token_graph_sizes = room, room.limits, token_graph_sizes
        self.steps, self.reports = deque(), deque()
        self.free_ns, self.now_ns = [0] * self.limits.depth, 0
        self.next_plan = FIRST_PLAN
        self.most_waiting = 0
        self.mixes = []
        self.written = set()  # blocks
        self._tables, self._lengths, self._prompts = {}, {}, {}

    def dispatch(self, step):
        step = decode_order(encode(step))
        assert step.plan == self.next_plan
        assert step.depends_on == -1
        self.next_plan += 1
        self.steps.append((step, self._taken(step), self.now_ns))
        self.most_waiting = max(self.most_waiting, len(self.steps))

    def _taken(self, step):
        """What the step holds."""
        for new in step.admissions:
            self._tables[new.slot], self._prompts[new.slot] = [], new.token_ids
            assert 0 <= min(new.token_ids) <= max(new.token_ids) < VOCAB_SIZE
        decoding = array("i", step.decode_slots).tolist()
        assert len(decoding) == step.num_decodes
        for chunk in step.chunks:
            self._tables[chunk.slot] += chunk.blocks
            self._lengths[chunk.slot] = chunk.start + chunk.num_tokens
            assert self._lengths[chunk.slot] <= len(self._prompts[chunk.slot])
        for slot, block in step.grown:
            self._tables[slot].append(block)
        for slot in decoding:
            self._lengths[slot] += 1
        self._check_blocks([*decoding, *(chunk.slot for chunk in step.chunks)])
        contexts = tuple(self._lengths[slot] for slot in decoding)
        chunks = tuple((chunk.start, chunk.num_tokens) for chunk in step.chunks)
        self.mixes.append(Mix(chunks=chunks, contexts=contexts, num_final=sum(chunk.final for chunk in step.chunks)))
        assert self.mixes[-1].num_tokens <= self.room.max_tokens
        return self.mixes[-1]

    def _check_blocks(self, slots):
        assert len(set(slots)) == len(slots) <= self.limits.max_num_seqs
        needed = []
        for slot in slots:
            assert self._lengths[slot] <= self.limits.max_tokens_per_sequence
            assert len(self._tables[slot]) <= -(-self.limits.max_model_len // self.limits.block_size)
            num = -(-self._lengths[slot] // self.limits.block_size)
            assert num <= len(self._tables[slot])
            needed += self._tables[slot][:num]
        blocks = set(needed)
        assert len(blocks) == len(needed), "sequences share a block"
        assert 0 <= min(blocks) <= max(blocks) < self.limits.num_blocks
        self.written |= blocks

    def await_report(self):
        if not self.reports:
            self._compute(*self.steps.popleft())
        return self.reports.popleft()

    def _compute(self, step, mix, ready_ns):
        layers, head, gap = self.cost(mix)
        depth, times = self.limits.depth, []
        for stage in range(depth):
            start = max(ready_ns, self.free_ns[stage] + gap)
            # The last stage is the slowest: others' steps wait for it.
            share = layers // (depth + 1) if stage < depth - 1 else layers - (depth - 1) * (layers // (depth + 1))
            end = start + share + (head if stage == depth - 1 else 0)
            times.append(StageTime(step.plan, stage, start, start + share, end))
            self.free_ns[stage], ready_ns = end, end + transfer_ns(mix.num_tokens)
        self.now_ns = self.free_ns[-1]
        # The last stage tells its time before its tokens, another one whenever it gets to it.
        self.reports += [*times[1:], StepDone(step.plan, b"", None, None), times[0]]

    def cost(self, mix):
        num, sizes = len(mix.contexts), self.room.graph_sizes
        attention = decode_attention_ns(mix.contexts)
        if not mix.chunks:
            gap = "chunked_ns" if sizes and num > sizes[-1] else "decode_ns"
            layers = decode_ns(num, sizes, skips_padding=self.room.skips_padding) + attention
            return layers, graph_head_ns(num, sizes), GAPS_NS[gap]
        layers = tokens_ns(mix.num_tokens, self.token_graph_sizes, skips_padding=self.room.skips_padding)
        layers += mixed_ns(mix.contexts) + attention + prefill_ns(mix.chunks)
        layers += beside_ns(mix.num_tokens - num, mix.contexts)
        return layers, graph_head_ns(mix.num_sampled, sizes), GAPS_NS["chunked_ns"]


GRAPHS = (1, 2, 4, 8, 16, 24)


def room(*, graph_sizes=GRAPHS, token_graph_sizes=(), skips_padding=False, max_tokens=1100, **limits):
    limits = {"num_blocks": 4000, "block_size": 16, "max_model_len": 2600, "max_num_seqs": 40, "depth": 1} | limits
    limits = Limits(**limits)
    sizes = {"graph_sizes": graph_sizes, "token_graph_sizes": token_graph_sizes}
    return Room(limits=limits, max_tokens=max_tokens, **sizes, skips_padding=skips_padding)


def measured(where, *, quick=False):
    """The grid and the tables, from fake workers, which come last."""
    grid = make_grid(where, quick=quick)
    workers = FakeWorkers(grid.room, where.token_graph_sizes)
    maker = StepMaker(where.limits, VOCAB_SIZE, max_tokens=grid.room.max_tokens, first_plan=FIRST_PLAN)
    return grid, json.loads(json.dumps(profiler.measure_tables(workers, grid, maker))), workers


TOKEN_GRAPHS = (16, 32, 64, 128)
ROOMS = {
    "graphs": {},
    "no graphs": {"graph_sizes": ()},
    "two stages": {"depth": 2, "max_in_flight": 3},
    "one at a time": {"max_in_flight": 1},
    "odd": {"block_size": 3, "max_tokens": 777, "max_num_seqs": 23, "graph_sizes": (1, 2, 4, 8, 16, 23)},
    "short": {"max_model_len": 67, "graph_sizes": (), "depth": 3, "max_in_flight": 4},
    "few sequences": {"max_num_seqs": 5, "graph_sizes": (1, 2, 4, 5)},
    "more sequences than graphs": {"max_num_seqs": 600, "graph_sizes": (1, 2)},
    "graphs of chunks": {"token_graph_sizes": TOKEN_GRAPHS},
    "padding that costs less": {"token_graph_sizes": (*TOKEN_GRAPHS, 512), "skips_padding": True},
    "nothing beyond graphs": {"token_graph_sizes": (*TOKEN_GRAPHS, 512, 1100), "depth": 2, "max_in_flight": 3},
    "one token beyond graphs": {"token_graph_sizes": (*TOKEN_GRAPHS, 1099), "max_model_len": 600},
    "graphs beyond the slots": {
        "token_graph_sizes": (*TOKEN_GRAPHS, 256, 512, 1100),
        "max_num_seqs": 5,
        "graph_sizes": (1, 2, 4, 5),
    },
    "more sequences than graphs of chunks": {
        "max_num_seqs": 600,
        "graph_sizes": (1, 2, 4),
        "token_graph_sizes": (*TOKEN_GRAPHS, 512),
    },
}


@cache
def measured_in(name):
    return measured(room(**ROOMS[name]))


@pytest.mark.parametrize("name", ROOMS)
def test_tables_recover_what_steps_cost(name):
    where = room(**ROOMS[name])
    grid, tables, _ = measured_in(name)
    assert tables["base_chunk"] == 64
    sizes, token_sizes = where.graph_sizes, where.token_graph_sizes
    most = min(where.max_tokens, 64 * where.limits.max_num_seqs)
    token_sizes_measured = [size for size in token_sizes if size <= most]
    if len(token_sizes_measured) < len(token_sizes):
        most = token_sizes_measured[-1]
    assert tables["max_tokens"] == most
    assert (tables["graph_sizes"], tables["token_graph_sizes"]) == (list(sizes), token_sizes_measured)
    skips = {"skips_padding": where.skips_padding}
    assert as_curve(tables["tokens"], "tokens") == {num: tokens_ns(num, token_sizes, **skips) for num in grid.tokens}
    assert as_curve(tables["decode"], "batches") == {num: decode_ns(num, sizes, **skips) for num in grid.decode_batches}
    mixed = tables["mixed"]
    assert (mixed["batches"], mixed["contexts"]) == (list(grid.mixed_batches), list(grid.mixed_contexts))
    for (row, num), (column, context) in product(enumerate(grid.mixed_batches), enumerate(grid.mixed_contexts)):
        fits = where.fits(grid.mixed(num, context))
        assert mixed["ns"][row][column] == (mixed_ns([context] * num) if fits else None), (num, context)
    if grid.head_rows:
        assert as_curve(tables["head"], "rows") == {num: head_ns(num) for num in grid.head_rows}
    else:
        assert tables["head"] is None
    if sizes:
        assert as_curve(tables["graph_head"], "rows") == {num: graph_head_ns(num, sizes) for num in sizes}
    else:
        assert tables["graph_head"] is None
    assert tables["gap"] == GAPS_NS


@pytest.mark.parametrize("name", ROOMS)
def test_attention_is_what_is_beyond_the_base(name):
    grid, tables, _ = measured_in(name)
    decode = tables["decode_attention"]
    assert (decode["batches"], decode["contexts"]) == (list(grid.batches), list(grid.contexts))
    for (row, num), (column, context) in product(enumerate(grid.batches), enumerate(grid.contexts)):
        fits = num * math.ceil((context + DRIFT) / grid.room.limits.block_size) <= grid.room.limits.num_blocks
        assert decode["ns"][row][column] == (num * 11 * (context - 16) if fits else None), (num, context)
    prefill = tables["prefill_attention"]
    assert (prefill["queries"], prefill["starts"]) == (list(grid.queries), list(grid.starts))
    for (row, num), (column, start) in product(enumerate(grid.queries), enumerate(grid.starts)):
        one, each, most = prefill["one_ns"][row][column], prefill["each_ns"][row][column], grid.num_each(num, start)
        if start + num > grid.room.limits.max_model_len:
            assert (one, each, most) == (None, None, 0)
        else:
            fitting = grid.room.limits.num_blocks // math.ceil((start + num) / grid.room.limits.block_size)
            assert most == min(16, grid.room.max_tokens // num, grid.room.limits.max_num_seqs, fitting)
            assert one == one_ns(start, num)
            assert each == (one if most == 1 else one // 2), (num, start)


def as_curve(table, points):
    assert all(a < b for a, b in zip(table[points], table[points][1:], strict=False))
    return dict(zip(table[points], table["ns"], strict=True))


@pytest.mark.parametrize("kernel", [None, CHUNK_KERNEL], ids=["tables", "schedule"])
@pytest.mark.parametrize("name", ROOMS)
def test_the_simulator_adds_up_to_what_was_measured(name, kernel, tmp_path):
    grid, tables, workers = measured_in(name)
    path, limits = tmp_path / "found.json", grid.room.limits
    sizes = {"num_blocks": limits.num_blocks, "block_size": limits.block_size, "chunk_kernel": kernel}
    parallel = {"pp": limits.depth, "tp": 1, "ep": 1}
    path.write_text(json.dumps(contents(**tables, **sizes, parallel=parallel)))
    cost = Profiled(profile=read_profile(path), shape=SHAPE, gpu=get_gpu("h200"))

    def work(mix):
        return batch_work(chunks=mix.chunks, contexts=mix.contexts, num_sampled=mix.num_sampled)

    for mix in grid.mixes():
        layers, head, gap = workers.cost(mix)
        assert cost.gap_ns(work(mix)) == gap
        # Base chunks beside a shorter one, or in a graph for more, are no points of the tables that are corrected; and
        # checks, and what is measured for the clock alone, are points of no table.
        if mix not in {*grid.checks, grid.busy} and (kernel is None or mix != grid.base(mix.num_tokens)):
            # Chunks that are shorter than base chunks may take less together than one alone, which is not read so.
            off = 0.005 * layers if kernel and len(mix.chunks) > 1 and mix.chunks[0][1] < BASE_CHUNK else MOST_EACH
            assert cost.stage_ns(work(mix)) == pytest.approx([layers + head], abs=off), mix
            assert cost.components(work(mix))["head"] == [head]
    assert cost.notes == []


def test_prompts_beside_decodes_take_more(tmp_path, monkeypatch):
    """Whatever their number and the decodes'; steps of one prompt are measured."""
    monkeypatch.setitem(globals(), "one_ns", lambda start, num: 7 * num * start + 900 * max(0, num - BASE_CHUNK))
    where = room(max_tokens=1400, max_num_seqs=100, num_blocks=20_000)
    grid, tables, _ = measured(where)
    sizes = [(16, 496), (16, 1008), (16, 1136), (64, 512), (64, 960), (64, 1088)]  # in all a point of `tokens`
    assert [(len(mix.contexts), mix.chunks) for mix in grid.beside] == [(num, ((0, size),)) for num, size in sizes]
    assert {sum(mix.contexts) for mix in grid.beside} == {16 * 1024, 64 * 1024}
    path = tmp_path / "found.json"

    def cost(tables):
        path.write_text(json.dumps(contents(**tables, num_blocks=20_000, block_size=16)))
        return Profiled(profile=read_profile(path), shape=SHAPE, gpu=get_gpu("h200"))

    known, unknown = cost(tables), cost(tables | {"beside": None})
    for chunks in ([(0, 64)], [(0, 300)], [(512, 250), (0, 60)], [(0, 900)], [(512, 900), (0, 100)], [(0, 400)] * 3):
        for contexts in ([16], [1000] * 5, [500] * 60, [1500] * 60, []):
            work, num_tokens = batch_work(chunks=chunks, contexts=contexts), sum(num for _, num in chunks)
            (took_ns,), (without_ns,) = known.stage_ns(work), unknown.stage_ns(work)
            # Beyond the longest prompt that is measured, 1,136 tokens or 1,088, it stays.
            expected = beside_ns(min(num_tokens, 1136 if sum(contexts) <= 30_000 else 1088), contexts)
            assert took_ns - without_ns == pytest.approx(expected, rel=0.02, abs=2), (chunks, contexts)
            assert known.components(work)["prefill_attention"] == unknown.components(work)["prefill_attention"]


def test_prompts_beside_decodes_are_about_as_long_whatever_is_captured():
    where = {"max_tokens": 2560, "max_num_seqs": 512, "max_model_len": 9000, "num_blocks": 40_000}
    for sizes in ((), (*TOKEN_GRAPHS, 512, 1088), (*TOKEN_GRAPHS, 256, 512, 640, 768, *range(1024, 2561, 256))):
        grid = make_grid(room(token_graph_sizes=sizes, **where))
        pairs = list(product((16, 64, 256), (512, 1024, 1536, 2048)))
        assert [len(mix.contexts) for mix in grid.beside] == [num for num, _ in pairs]
        for mix, (num, about) in zip(grid.beside, pairs, strict=True):
            ((start, size),) = mix.chunks
            assert (start, size + num in grid.tokens, sum(mix.contexts)) == (0, True, num * 1024)
            assert about - 256 <= size <= min(about + 128, 2048), "as long as chunks that are measured alone"
    assert make_grid(room(**where | {"max_num_seqs": 15})).beside == (), "no room for 16"


def test_points_of_tokens_are_what_is_captured_and_what_is_beyond():
    found = make_grid(room(token_graph_sizes=TOKEN_GRAPHS))
    stairs = [num + side for num in range(192, 1025, 64) for side in ((-1, 1) if num % 128 == 0 else (-1,))]
    assert found.tokens == (*TOKEN_GRAPHS, 129, *stairs, 1100), "both ends of stairs, no multiples of 64"
    assert found.head_rows == (25, 32, 39, 40), "more rows than a graph of heads takes"
    assert found.head(32) == Mix(chunks=((0, 64),), contexts=(16,) * 32)
    assert found.head(40) == Mix(contexts=(16,) * 40)
    quick = make_grid(room(token_graph_sizes=TOKEN_GRAPHS), quick=True)
    assert quick.tokens == (*TOKEN_GRAPHS, 129, 255, 257, 1023, 1025, 1100)
    longer = make_grid(room(token_graph_sizes=TOKEN_GRAPHS, max_tokens=2600, max_num_seqs=64))
    on_stairs = [num for start in range(1024, 2048, 128) for num in (start + 1, start + 65, start + 127)]
    assert longer.tokens[longer.tokens.index(1025) :] == (*on_stairs, 2049, 2303, 2305, 2559, 2561, 2600)
    next_to_one = make_grid(room(token_graph_sizes=(*TOKEN_GRAPHS, 190)))
    assert next_to_one.tokens == (*TOKEN_GRAPHS, 190, *stairs, 1100)
    whole = make_grid(room(token_graph_sizes=(*TOKEN_GRAPHS, 1100)))
    assert whole.tokens == (*TOKEN_GRAPHS, 1100)
    assert whole.head_rows == (25, 32, 39, 40)


def test_where_padding_costs_less_graphs_are_measured_with_the_fewest_they_are_replayed_for_too():
    found = make_grid(room(token_graph_sizes=(16, 17, 128), skips_padding=True))
    assert found.tokens[:7] == (1, 16, 17, 18, 128, 129, 191)
    assert found.decode_batches == (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 40)


@pytest.mark.parametrize("quick", [False, True])
def test_more_sequences_than_a_step_holds(quick):
    """Of decodes alone there is then no batch as large as what fits beside a chunk."""
    grid, tables, _ = measured(room(graph_sizes=(), max_tokens=200, max_num_seqs=256), quick=quick)
    assert grid.mixed_batches[-1] == grid.batches[-1] < 200 - BASE_CHUNK
    found = tables["mixed"]["ns"][-1][0]
    assert found is not None if quick else found == mixed_ns([16] * grid.batches[-1])  # quick: between points of tokens


def test_a_graph_takes_so_many_chunks_and_longer_ones_beyond():
    found = make_grid(room(token_graph_sizes=(*TOKEN_GRAPHS, 4096, 7808), max_tokens=8192, max_num_seqs=256))
    assert [len(found.base(num).chunks) for num in found.tokens] == [1, 1, 1, 2, 64, 64, 123, 124, 125, 128]
    in_graph = [num <= 7808 and len(found.base(num).chunks) <= MAX_CHUNKS for num in found.tokens]
    assert in_graph == [True] * 6 + [False] * 4
    assert all(found.base(num).num_tokens == num for num in found.tokens)
    short = make_grid(room(token_graph_sizes=(128, 4096, 7808), max_tokens=8192, max_num_seqs=256, max_model_len=100))
    assert short.tokens == (128, 4096), "64 prompts are no longer"


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({"attention_backend": "triton"}, "NVIDIA H200", (True, True)),
        ({"attention_backend": "flash"}, "NVIDIA H200", (True, False)),
        ({"attention_backend": "triton", "cuda_graphs": False}, "NVIDIA H200", (False, False)),
        ({}, "cpu", (False, False)),
    ],
)
def test_what_is_captured_is_what_workers_capture(options, device, expected):
    limits = Limits(num_blocks=400, block_size=16, max_model_len=2600, max_num_seqs=20)
    config = RuntimeConfig(model="qwen3-0.6b", policy="sarathi:token_budget=500", **options)
    found = command.room(config, SHAPE, limits, device)
    assert (found.max_tokens, found.graph_sizes != (), found.token_graph_sizes != ()) == (500, *expected)
    assert found.graph_sizes == ((1, 2, 4, 8, 16, 20) if expected[0] else ())
    assert found.token_graph_sizes[-1:] == ((500,) if expected[1] else ())
    assert not found.skips_padding
    experts = replace(SHAPE, num_experts=8, num_experts_per_token=2, moe_intermediate_size=16, moe_layers=(0,))
    assert command.room(config, experts, limits, device).skips_padding is expected[0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "expected"), [(16, 8, 1, (8, 2, 66)), (32, 8, 2, (4, 4, 132)), (32, 4, 8, (1, 4, 528))]
)
def test_workers_say_what_their_kernel_is(heads, kv_heads, tp, expected, monkeypatch):
    for module in (chunk_plan, worker):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: 132)
    shape = replace(SHAPE, num_heads=heads, num_kv_heads=kv_heads)
    found = worker.chunk_kernel("triton", shape, tp, torch.bfloat16, torch.device("cpu"))
    assert (found.kv_heads, found.group_size, found.places) == expected
    assert (found.rows, found.tile, found.least_tiles, found.multiprocessors) == (128, 64, 4, 132)
    assert worker.chunk_kernel("flash", shape, tp, torch.bfloat16, torch.device("cpu")) is None
    ready = WorkerReady(0, 100, "NVIDIA H200", found)
    assert decode_report(encode(ready)) == ready


def test_checks_are_within_and_beyond_graphs():
    for token_graph_sizes in (TOKEN_GRAPHS, (*TOKEN_GRAPHS, 1098)):
        checks = make_grid(room(token_graph_sizes=token_graph_sizes)).checks
        kinds = [(check.num_tokens > token_graph_sizes[-1]) + 1 if check.chunks else 0 for check in checks]
        assert kinds == [0, 1, 2] * 8
        assert len({check.num_tokens for check in checks}) > 16
    assert all(check.num_tokens <= 1100 for check in make_grid(room(token_graph_sizes=(*TOKEN_GRAPHS, 1100))).checks)


def test_transfers_are_of_a_stage_that_waits():
    for depth in (2, 3):
        grid, tables, _ = measured(room(depth=depth, max_in_flight=depth + 1, graph_sizes=()))
        assert grid.transfer_tokens[0] == 1
        assert grid.transfer_tokens[-1] == 1100
        assert as_curve(tables["transfer"], "tokens") == {num: transfer_ns(num) for num in grid.transfer_tokens}
    assert measured(room())[1]["transfer"] is None


def test_a_transfer_takes_no_less_than_nothing(monkeypatch):
    """The stamps of two GPUs are as far apart as their clocks, which may be more than a few bytes' way."""
    monkeypatch.setitem(globals(), "transfer_ns", lambda num_tokens: num_tokens - 100)
    _, tables, _ = measured(room(depth=2, max_in_flight=3, graph_sizes=()))
    curve = as_curve(tables["transfer"], "tokens")
    assert curve == {num: max(0, num - 100) for num in curve}
    assert 0 in curve.values()


def test_what_does_not_fit_the_cache_is_null():
    small = room(num_blocks=300, graph_sizes=())  # of 16 tokens
    grid, tables, workers = measured(small)
    decode = tables["decode_attention"]
    assert dict(zip(decode["batches"], decode["ns"], strict=True))[8] == [0, 8 * 11 * 240, 8 * 11 * 496, None, None]
    assert grid.num_each(256, 2048) == 2  # of 144 blocks each
    prefill = tables["prefill_attention"]
    rows = dict(zip(prefill["queries"], prefill["each_ns"], strict=True))
    assert rows[256] == [one_ns(start, 256) // 2 for start in grid.starts]
    assert rows[1024] == [one_ns(start, 1024) for start in (0, 256, 512, 768, 1024, 1536)] + [None]
    assert len(workers.written) == 300


def test_checks_are_measured_as_they_say():
    for depth in (1, 2):
        grid, tables, workers = measured(room(depth=depth, max_in_flight=depth + 1))
        assert len(tables["checks"]) == 24
        assert sum(not check["chunks"] for check in tables["checks"]) == 8
        for check, mix in zip(tables["checks"], grid.checks, strict=True):
            assert [tuple(chunk) for chunk in check["chunks"]] == list(mix.chunks)
            assert check["num_sampled"] == len(check["contexts"]) + mix.num_final
            layers, head, _ = workers.cost(mix)
            assert sum(check["stage_ns"]) == layers + head
            assert len(check["stage_ns"]) == depth
        assert len({len(check["contexts"]) for check in tables["checks"]}) > 8


def test_quick_is_a_tenth_of_the_steps():
    where = room(graph_sizes=(), max_tokens=2048, max_num_seqs=256, num_blocks=100_000, max_model_len=40_000)
    assert len(make_grid(where, quick=True).mixes()) * 5 < len(make_grid(where).mixes())
    _, tables, _ = measured(where, quick=True)
    assert len(tables["checks"]) == 6
    assert as_curve(tables["decode"], "batches") == {num: decode_ns(num, ()) for num in (1, 8, 64, 256)}


def test_so_many_steps_are_on_the_road():
    for given, most in ((1, 2), (2, 2), (5, 5)):
        workers = measured(room(max_in_flight=given), quick=True)[2]
        assert workers.most_waiting == most


def test_decodes_pass_their_context_in_the_middle_of_an_odd_number_of_steps():
    where = room()
    workers = FakeWorkers(where)
    maker = StepMaker(where.limits, VOCAB_SIZE, max_tokens=where.max_tokens, first_plan=FIRST_PLAN)
    mix = Mix(chunks=((0, 5), (30, 7)), contexts=(16, 100), num_final=1)
    before, steps = maker.make(mix, MAX_REPEATS)
    Session(workers, num_stages=1, max_in_flight=2).run([*before, *steps])
    repeated = workers.mixes[len(before) :]
    assert repeated[DRIFT] == mix
    assert [each.contexts[1] for each in repeated] == list(range(96, 105))
    assert [[(chunk.slot, chunk.final) for chunk in step.chunks] for step in steps] == [
        [(2, False), (3, True)]
    ] * MAX_REPEATS
    assert sum(len(step.grown) for step in steps) == 2, "each slot grows once"


def test_a_gpus_cache_is_filled_first():
    for num_blocks in (4000, 130):
        grid = make_grid(room(num_blocks=num_blocks))
        workers = FakeWorkers(grid.room)
        maker = StepMaker(grid.room.limits, VOCAB_SIZE, max_tokens=grid.room.max_tokens, first_plan=FIRST_PLAN)
        profiler.fill(Session(workers, num_stages=1, max_in_flight=2), maker, grid.room)
        assert workers.written == set(range(num_blocks))


class ClockedWorkers(FakeWorkers):
    """Stages whose clocks follow what they compute; they rest while the session does."""

    def __init__(self, room, clock, *, slower=1):
        super().__init__(room)
        self.clock, self.stage, self.last_ns, self.slower = clock, StageClock(clock), 0, slower

    def rest(self, seconds):
        self.now_ns += int(seconds * 1e9)

    def cost(self, mix):
        layers, head, gap = super().cost(mix)
        attention = decode_attention_ns(mix.contexts) + bool(mix.chunks) * mixed_ns(mix.contexts)
        prefill = prefill_ns(mix.chunks) if mix.chunks else 0
        base = layers - attention - prefill
        drawn = base * self.clock.base_power(
            mix.num_tokens, min(1.0, 20_000 * mix.num_tokens / base), has_chunks=bool(mix.chunks)
        )
        drawn += self.clock.prefill * prefill + self.clock.attention * attention
        idle_ns, depth = max(0, self.now_ns - self.last_ns), self.limits.depth
        rested_ns, stretched_ns = layers * self.slower // depth, (layers - attention) * self.slower / depth
        took = self.stage.step(idle_ns, rested_ns, stretched_ns, drawn / layers) * depth
        self.last_ns = max(self.now_ns, self.last_ns) + took // depth + head + gap
        return took, head, gap


def clocked(where, clock, monkeypatch, *, quick=False, slower=1):
    """Tables of workers with a clock."""
    grid, workers = make_grid(where, quick=quick), ClockedWorkers(where, clock, slower=slower)
    monkeypatch.setattr(Session, "rest", lambda _, seconds: workers.rest(seconds))
    maker = StepMaker(where.limits, VOCAB_SIZE, max_tokens=grid.room.max_tokens, first_plan=FIRST_PLAN)
    return json.loads(json.dumps(profiler.measure_tables(workers, grid, maker, on_gpu=True)))


# An H200 keeps its clock for the first 45 ms; by these constants an average takes as long to the knee.
LIMIT = PowerLimit(tau_ns=120_000_000, slowdown=0.15, knee=0.4)
CLOCK = GpuClock(limits=(LIMIT,), attention=0.5)


def other_limit(**changes):
    """`CLOCK` with another limit."""
    return replace(CLOCK, limits=(replace(LIMIT, **changes),))


@pytest.mark.parametrize(
    "clock",
    [
        CLOCK,
        other_limit(tau_ns=150_000_000, slowdown=0.25),
        replace(other_limit(knee=0.5), attention=0.8),
        replace(other_limit(slowdown=0.06), attention=0.2),
    ],
)
def test_a_clock_is_recovered_from_steps_in_a_row(clock, monkeypatch, tmp_path):
    found = clocked(room(max_num_seqs=100, num_blocks=8000), clock, monkeypatch, quick=True)["clock"]
    (limit,), (made,) = found["limits"], clock.limits
    assert limit["tau_ns"] == pytest.approx(made.tau_ns, rel=0.15)
    assert limit["slowdown"] == pytest.approx(made.slowdown, rel=0.1)
    assert limit["knee"] == pytest.approx(made.knee, abs=0.08)
    assert found["attention"] == pytest.approx(clock.attention, abs=0.12)
    assert found["mean_error"] < 0.004 < found["mean_error_without"]
    path = tmp_path / "found.json"
    path.write_text(json.dumps(contents(clock=found)))
    assert read_profile(path).clock.limits[0].tau_ns == limit["tau_ns"]


@pytest.mark.parametrize("attention", [0.2, 0.8])
def test_attention_of_decodes_that_stay_cool_alone_shows_beside_prompts(attention, monkeypatch):
    attended_ns = decode_attention_ns
    monkeypatch.setitem(globals(), "decode_ns", lambda *_, **__: 20_000_000)  # as where experts are read
    monkeypatch.setitem(globals(), "decode_attention_ns", lambda contexts: 4 * attended_ns(contexts))
    clock = replace(other_limit(slowdown=0.25), attention=attention)
    where = room(max_num_seqs=100, max_tokens=1400, num_blocks=8000)
    found = clocked(where, clock, monkeypatch, quick=True)["clock"]
    assert found["attention"] == pytest.approx(attention, abs=0.15)


def test_unequal_stages_make_no_slower_clock(monkeypatch):
    """What one waits for another is not taken for a rest of both."""
    where = room(max_num_seqs=100, num_blocks=8000, depth=2, max_in_flight=3)
    (limit,) = clocked(where, CLOCK, monkeypatch, quick=True)["clock"]["limits"]
    assert limit["tau_ns"] == pytest.approx(LIMIT.tau_ns, rel=0.25)
    assert limit["slowdown"] == pytest.approx(LIMIT.slowdown, rel=0.3)


def test_a_slow_limit_is_found_in_seconds_of_steps(monkeypatch):
    slow = PowerLimit(tau_ns=600_000_000, slowdown=0.06, knee=0.75)  # four tenths of a second leave it where it is
    clock = GpuClock(limits=(replace(LIMIT, tau_ns=60_000_000), slow), attention=0.5)
    found = clocked(room(max_num_seqs=100, num_blocks=8000), clock, monkeypatch, quick=True)["clock"]
    first, second = found["limits"]
    assert first["slowdown"] == pytest.approx(LIMIT.slowdown, rel=0.15)
    assert second["slowdown"] == pytest.approx(slow.slowdown, rel=0.25)
    assert 300_000_000 < second["tau_ns"] < 1_200_000_000
    assert found["mean_error"] < 0.004 < found["mean_error_without"]


class SizedWorkers(ClockedWorkers):
    """Of which a size draws less than others at its rate, and so do chunks that attend to much."""

    def cost(self, mix):
        is_odd = mix.num_tokens == ODD and not any(start for start, _ in mix.chunks)
        self.clock = replace(CLOCK, power=(0.8,) if is_odd else (1.0,), tokens=(ODD,), prefill=0.3)
        return super().cost(mix)


ODD = 1024


def test_attention_of_chunks_is_found_whatever_is_captured(monkeypatch):
    where = room(max_num_seqs=40, num_blocks=8000, max_tokens=1100, token_graph_sizes=(16, 32, 64))
    found = clocked(where, replace(CLOCK, prefill=0.3), monkeypatch, quick=True)["clock"]
    assert found["prefill"] == pytest.approx(0.3, abs=0.15)


def test_steps_that_are_all_long_have_a_clock_too(monkeypatch):
    where = room(max_tokens=2200, max_num_seqs=100, num_blocks=8000)
    found = clocked(where, CLOCK, monkeypatch, quick=True, slower=40)["clock"]
    assert found["limits"][0]["slowdown"] == pytest.approx(LIMIT.slowdown, rel=0.5)
    assert found["mean_error"] < found["mean_error_without"] / 3


def test_a_size_that_draws_less_is_found(monkeypatch):
    monkeypatch.setitem(globals(), "ClockedWorkers", SizedWorkers)
    where = room(max_num_seqs=100, num_blocks=8000, max_tokens=1200)
    found = clocked(where, CLOCK, monkeypatch, quick=True)["clock"]
    power = dict(zip(found["tokens"], found["power"], strict=True))
    others = [value for num, value in power.items() if num != ODD]
    assert len(others) == 2
    assert power[ODD] < 0.9 * min(others)
    assert found["prefill"] == pytest.approx(0.3, abs=0.15)
    assert found["mean_error"] < 0.005


@pytest.mark.parametrize("depth", [1, 2])
def test_tables_are_those_of_a_gpu_that_is_rested(depth, monkeypatch):
    where = room(depth=depth, max_in_flight=depth + 1)
    found, rested = clocked(where, CLOCK, monkeypatch), measured(where)[1]
    assert found["tokens"]["ns"] == pytest.approx(rested["tokens"]["ns"], rel=0.003)
    assert found["decode"]["ns"] == pytest.approx(rested["decode"]["ns"], rel=0.012)
    for ours, theirs in zip(found["checks"], rested["checks"], strict=True):
        assert sum(ours["stage_ns"]) == pytest.approx(sum(theirs["stage_ns"]), rel=0.02)
    assert found["gap"] == rested["gap"]


def test_long_steps_hold_their_own_heat_and_no_one_elses(monkeypatch):
    """A single step of a large model takes as long as a GPU keeps its clock, and longer."""
    where, clock = room(max_tokens=2200, max_num_seqs=100, num_blocks=8000), other_limit(tau_ns=40_000_000)
    found = clocked(where, clock, monkeypatch, quick=True, slower=16)
    assert found["clock"]["limits"][0]["slowdown"] == pytest.approx(LIMIT.slowdown, rel=0.2)
    rested = measured(where, quick=True)[1]["tokens"]["ns"]
    assert found["tokens"]["ns"] == pytest.approx([16 * time_ns for time_ns in rested], rel=0.03)


def test_without_a_slowdown_there_is_no_clock(monkeypatch):
    for slowdown in (0.0, 0.005):
        assert clocked(room(), other_limit(slowdown=slowdown), monkeypatch, quick=True)["clock"] is None
    assert measured(room(), quick=True)[1]["clock"] is None, "not on a GPU"


class ShakenWorkers(ClockedWorkers):
    """Whose clock stays, and of one size every third step takes longer."""

    num_shaken = 0

    def cost(self, mix):
        layers, head, gap = super().cost(mix)
        if mix.num_tokens == 256 and mix.chunks:
            self.num_shaken += 1
            layers += layers // 12 * (self.num_shaken % 3 == 0)
        return layers, head, gap


def test_what_is_no_heat_makes_no_clock(monkeypatch):
    fits = []
    monkeypatch.setitem(globals(), "ClockedWorkers", ShakenWorkers)
    monkeypatch.setattr(clock_module, "fit", lambda *args: fits.append(fit(*args)) or fits[-1])
    assert clocked(room(), other_limit(slowdown=0.0), monkeypatch, quick=True)["clock"] is None
    assert fits[-1] is not None, "found, and worse than none"


@pytest.mark.parametrize(("rests", "least_ns", "most_ns"), [(True, 150_000_000, 200_000_000), (False, 0, 50_000_000)])
def test_small_steps_are_measured_for_a_while(rests, least_ns, most_ns):
    where = room()
    workers = FakeWorkers(where)
    maker = StepMaker(where.limits, VOCAB_SIZE, max_tokens=where.max_tokens, first_plan=FIRST_PLAN)
    measure(Session(workers, num_stages=1, max_in_flight=2), maker, prompts(64, BASE_CHUNK), rests=rests)
    assert least_ns <= workers.now_ns < most_ns


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_gpu_all_mixes_may_rest(on_gpu, monkeypatch):
    found = []

    def note(session, maker, mix, *, alone=False, rests=False):
        found.append(rests)
        return measure(session, maker, mix, alone=alone)

    monkeypatch.setattr(profiler, "measure", note)
    monkeypatch.setattr(Session, "rest", lambda *_: None)
    grid = make_grid(room(), quick=True)
    maker = StepMaker(grid.room.limits, VOCAB_SIZE, max_tokens=grid.room.max_tokens, first_plan=FIRST_PLAN)
    profiler.measure_tables(FakeWorkers(grid.room), grid, maker, on_gpu=on_gpu)
    assert set(found) == {on_gpu}


def test_prompts_are_of_different_tokens():
    where = room()
    maker = StepMaker(where.limits, VOCAB_SIZE, max_tokens=where.max_tokens, first_plan=FIRST_PLAN)
    _, steps = maker.make(prompts(256, 64), 3)
    drawn = {tuple(new.token_ids) for step in steps for new in step.admissions}
    assert len(drawn) == 4 * 3


@pytest.mark.parametrize("few", [{"max_tokens": 127}, {"max_num_seqs": 1}, {"max_model_len": 63}, {"num_blocks": 7}])
def test_too_little_room(few):
    with pytest.raises(ValueError, match=r"a profile needs steps of two prompts of 64 tokens; raise --max-tokens-per"):
        make_grid(room(**few))


def test_the_host_is_timed_where_nothing_else_delays_it():
    # The second and the fourth step were decided while another one was on the road.
    dispatched, starts = [100, 150, 400, 450, 900], [107, 207, 411, 510, 909]
    ends, done = [200, 300, 500, 600, 990], [230, 330, 520, 640, 1025]
    assert host_times(dispatched, starts, ends, done) == (9, 30)
    assert host_times([100], [90], [200], [190]) == (0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    make("qwen3", folder)
    return folder


OPTIONS = ("--device", "cpu", "--max-num-seqs", 4, "--num-blocks", 200)


@pytest.mark.parametrize(
    ("pp", "options", "max_tokens"), [(1, ("--out", "found.json"), 256), (2, ("--max-tokens-per-step", 128), 128)]
)
def test_real_workers(pp, options, max_tokens, folder, tmp_path):
    out = tmp_path / ("found.json" if "--out" in options else f"profile_{folder.name}_pp{pp}_cpu.json")
    options = ("--model", folder, *OPTIONS, "--quick", "--quiet", "--pp", pp, *options)
    with Command("profile", *options, cwd=tmp_path) as command:
        assert command.ended() == (0, []), command.err
        assert command.left() == []
        assert command.out.splitlines()[-1] == f"profile {out.name}"
    assert list(tmp_path.iterdir()) == [out]
    found = json.loads(out.read_text())
    assert {key: found[key] for key in ("format", "version", "gpu", "device", "dtype", "layers", "num_blocks")} == {
        "format": "gllm-profile",
        "version": 1,
        "gpu": None,
        "device": "cpu",
        "dtype": "float32",
        "layers": 3,
        "num_blocks": 200,
    }
    assert (found["parallel"], found["attention_backend"]) == ({"pp": pp, "tp": 1, "ep": 1}, "torch")
    assert found["chunk_kernel"] is None
    assert found["made"]["command"].startswith("python -m gllm.runtime profile --model qwen3")
    assert str(folder) not in out.read_text()
    assert_whole(found, pp, max_tokens)
    assert read_profile(out).parallel.pp == pp
    assert len(gist(found)) == 9


def test_a_file_says_what_the_workers_kernel_is(folder, tmp_path, monkeypatch):
    kernel, limits = ChunkKernel(**CHUNK_KERNEL), room().limits
    workers = SimpleNamespace(load=lambda _: (limits, "NVIDIA H200"), chunk_kernel=kernel)
    monkeypatch.setattr(command, "started_workers", lambda _: nullcontext(workers))
    monkeypatch.setattr(host, "measure_intake", lambda: 5)
    described = {"num_blocks", "made", "chunk_kernel", "model_shape"}
    values = contents(host={"intake_ns": 5, "dispatch_ns": 6, "return_ns": 7})
    tables = {key: value for key, value in values.items() if key not in described}
    monkeypatch.setattr(profiler, "take_profile", lambda *_, **__: tables)
    out = tmp_path / "found.json"
    assert main(["profile", "--model", str(folder), "--out", str(out), "--quiet"]) == 0
    assert json.loads(out.read_text())["chunk_kernel"] == CHUNK_KERNEL
    assert read_profile(out).chunk_kernel == kernel


def assert_whole(found, pp, max_tokens):
    """All tables have their shapes, and times that cannot be negative are not."""
    assert found["max_tokens"] == max_tokens
    assert (found["graph_sizes"], found["token_graph_sizes"], found["graph_head"]) == ([], [], None)
    tokens = [1, 4, 16, 64, max_tokens]
    curves = [("decode", "batches", [1, 4]), ("tokens", "tokens", tokens), ("head", "rows", [1, 3, 4])]
    if pp > 1:
        curves.append(("transfer", "tokens", tokens))
    else:
        assert found["transfer"] is None
    for table, points, expected in curves:
        assert found[table][points] == expected
        assert len(found[table]["ns"]) == len(expected)
        assert min(found[table]["ns"]) > 0
    assert (found["mixed"]["batches"], found["mixed"]["contexts"]) == ([1, 3], [16])
    assert found["decode_attention"] == {"batches": [1, 4], "contexts": [16], "ns": [[0], [0]]}
    prefill = found["prefill_attention"]
    queries = [num for num in (1, 256) if num <= min(max_tokens, 256)]
    assert (prefill["queries"], prefill["starts"], prefill["one_ns"][0]) == (queries, [0], [0])
    assert [len(row) for row in prefill["each_ns"]] == [1] * len(queries)
    assert min(*found["gap"].values(), *found["host"].values()) > 0
    assert all(len(check["stage_ns"]) == pp and min(check["stage_ns"]) > 0 for check in found["checks"])


RAISES = """
import importlib.abc, importlib.util, sys
def install():
    import gllm.runtime.worker.stage as stage
    run = stage.Stage.run
    def broken(self, step):
        if step.plan == 450:  # its engine needs 400
            raise RuntimeError("out of luck")
        return run(self, step)
    stage.Stage.run = broken
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "gllm.runtime.worker.worker":
            return None
        sys.meta_path.remove(self)
        install()
        return importlib.util.find_spec(name)
sys.meta_path.insert(0, Finder())
"""


def test_a_worker_that_fails_ends_it(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RAISES)
    out = tmp_path / "out"
    out.mkdir()
    with Command(
        "profile", "--model", folder, *OPTIONS, "--quiet", "--out", out / "found.json", site=tmp_path
    ) as command:
        status, lines = command.ended()
        said = "gllm: error: worker 0 failed: RuntimeError: out of luck (GLLM_TRACEBACK=1 shows where)"
        assert (status, lines) == (1, [said])
        assert (command.left(), list(out.iterdir())) == ([], [])


def test_ctrl_c_leaves_nothing(folder, tmp_path):
    with Command("profile", "--model", folder, *OPTIONS, "--quiet", "--out", tmp_path / "found.json") as command:
        until(lambda: command.pids("worker"))
        command.interrupt()
        assert command.ended() == (130, ["gllm: interrupted"])
        assert (command.left(), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--out", "{tmp}/no/such/file.json"), "no/such/file.json: cannot be written (No such file or directory)"),
        (("--out", "{tmp}"), ": is a folder; name a file"),
        (("--out", "{tmp}/file/found.json"), "cannot be written (Not a directory)"),
        (("--nnodes", "2", "--pp", "2", "--rdzv-endpoint", "127.0.0.1:1"), "leave --nnodes out"),
        (("--tp", "3"), "--tp 3 does not divide"),
        (("--max-tokens-per-step", "0"), "argument --max-tokens-per-step"),
    ],
)
def test_mistakes_are_told_before_anything_starts(args, said, tmp_path, monkeypatch, capsys):
    def start(*_):
        raise AssertionError("started")

    monkeypatch.setattr(process, "start", start)
    (tmp_path / "file").touch()
    try:
        status = main(["profile", *(arg.format(tmp=tmp_path) for arg in args)])
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.splitlines()
    assert (status, len(lines)) == (2, 1)
    assert said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_too_small_for_a_kind_of_step_has_no_checks_of_it():
    """With these limits a step beyond the graphs would need four full sequences and one that decodes."""
    small = room(num_blocks=5, block_size=64, max_num_seqs=600, max_model_len=64, token_graph_sizes=(128, 256))
    kinds = [check.num_tokens > 256 for check in random_mixes(small, num=6, seed=0)]
    assert False in kinds


@pytest.mark.parametrize("num", [1, 2, 3, 16, 255, 512])
@pytest.mark.parametrize(("context", "longest"), [(1000, 40_000), (256, 40_000), (1000, 1100), (40, 40)])
def test_uneven_contexts_keep_their_mean(num, context, longest):
    contexts = uneven_decodes(num, context, longest).contexts
    assert (len(contexts), sum(contexts)) == (num, num * context)
    assert max(contexts) <= longest
    if num >= 16 and longest > 2 * context:
        assert context / 20 < min(contexts) < context / 3
        assert 3 * context < max(contexts) < 15 * context
        assert list(contexts) not in (sorted(contexts), sorted(contexts, reverse=True))


def test_no_context_is_longer_than_sequences_may_be():
    where = room(max_model_len=1200)
    grid = make_grid(where)
    longest = max(max(mix.ends) for mix in grid.mixes() if not mix.chunks)
    assert longest <= 1200
    assert 1024 in grid.contexts
