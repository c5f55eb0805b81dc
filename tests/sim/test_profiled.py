"""The profiled cost model: what formulas say at and between measured points, and the roofline's way beyond them."""

import json
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim import profiles
from sim.profiles import CLOCK, SHAPE, SIZED_CLOCK, contents, profile, stamped, step, two_stages, written

from gllm.parallel import Parallel
from gllm.report.metrics import summarize
from gllm.sim.config import SimConfig
from gllm.sim.constants import RooflineConstants
from gllm.sim.cost import COMPONENTS
from gllm.sim.gpus import get_gpu
from gllm.sim.pipeline import ProcessPipeline
from gllm.sim.profiled import Profiled, residuals
from gllm.sim.roofline import Roofline
from gllm.sim.run import simulate
from gllm.trace import TraceOptions

H200 = get_gpu("h200")
WORK = RooflineConstants(max_graph_size=0, launch_ns=0)  # without padding and launches
ROOFLINE = Roofline(shape=SHAPE, gpu=H200, constants=WORK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


def model(folder, values=None, *, gpu="h200", parallel=None):
    return Profiled(profile=profile(folder, values), shape=SHAPE, gpu=get_gpu(gpu), parallel=parallel or Parallel())


@pytest.fixture(scope="module")
def formula(folder):
    """One model for many questions inside its tables: it must find nothing to note."""
    cost = model(folder)
    yield cost
    assert cost.notes == []


def roofline_ns(name, chunks=(), contexts=(), num_sampled=0):
    return ROOFLINE.components(step(chunks, contexts, num_sampled))[name][0]


# --- inside the tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [16, 17, 256, 700, 1024, 4096])
@pytest.mark.parametrize("num_decode", [1, 2, 3, 8, 9, 31, 32])
def test_decodes_are_as_measured_and_padded(formula, num_decode, context):
    contexts = [context] * num_decode
    layers, head = stamped(contexts=contexts, num_sampled=num_decode)
    assert formula.stage_ns(step(contexts=contexts)) == pytest.approx([layers + head], abs=1)


def test_decodes_are_padded_by_hand(formula):
    # 9 sequences run as 16: 392,000 + 16,000; 9 * 84 keys at 3 ns; a head of 16 rows
    assert formula.stage_ns(step(contexts=[100] * 9)) == [408_000 + 2268 + 6600]


def test_contexts_are_taken_at_their_mean(formula):
    one, other = step(contexts=[100, 300, 1000]), step(contexts=[466, 467, 467])
    assert formula.stage_ns(one) == formula.stage_ns(other)


@pytest.mark.parametrize("start", [0, 100, 512, 2048])
@pytest.mark.parametrize("num_tokens", [16, 17, 64, 80, 100, 256, 512, 1024])
def test_a_chunk_alone(formula, num_tokens, start):
    layers, head = stamped([(start, num_tokens)], num_sampled=1)
    work = step([(start, num_tokens)])
    assert formula.stage_ns(work) == pytest.approx([layers + head], abs=1)
    unfinished = step([(start, num_tokens)], num_sampled=0)
    assert formula.stage_ns(unfinished) == pytest.approx([layers], abs=1)


chunk_lists = st.lists(st.tuples(st.integers(0, 512), st.integers(16, 128)), min_size=1, max_size=6)
context_lists = st.lists(st.integers(16, 1024), max_size=64)


@given(chunks=chunk_lists, contexts=context_lists, num_sampled=st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_mixed_steps(formula, chunks, contexts, num_sampled):
    layers, head = stamped(chunks, contexts, num_sampled=num_sampled)
    work = step(chunks, contexts, num_sampled)
    assert formula.stage_ns(work) == pytest.approx([layers + head], abs=2)


def test_many_chunks_take_what_each_adds_and_one_long_one_may_take_more(formula):
    by_hand = 400_000 + 5000 * 192  # 192 tokens
    together = step([(512, 64)] * 3, num_sampled=0)
    assert formula.stage_ns(together) == [by_hand + 3 * 3 * 64 * 512]
    alone = step([(2048, 64), (0, 64), (0, 64)], num_sampled=0)
    assert formula.stage_ns(alone) == [by_hand + 4 * 64 * 2048]


def beside(num_tokens, contexts, more_ns):
    """A measured step of one prompt and decodes, so much longer than formulas have it."""
    ns = int(sum(stamped([(0, num_tokens)], contexts, num_sampled=len(contexts)))) + more_ns
    return {"chunks": [[0, num_tokens]], "contexts": contexts, "num_sampled": len(contexts), "stage_ns": [ns]}


FEW, MANY = [1024] * 4, [1024] * 8
BESIDE = [beside(512, FEW, 5000), beside(960, FEW, 9000), beside(960, MANY, 12_000), beside(512, MANY, -2000)]


@pytest.mark.parametrize(
    ("chunks", "contexts", "more_ns"),
    [
        ([(0, 512)], FEW, 5000),
        ([(0, 960)], FEW, 9000),
        ([(512, 448), (0, 512)], FEW, 9000),  # however many chunks
        ([(0, 736)], FEW, 7000),
        ([(0, 288)], FEW, 2500),  # from nothing at a base chunk
        ([(0, 64)], MANY, 0),
        ([(0, 16)], MANY, 0),
        ([(0, 990)], FEW, 9000),  # stays
        ([(0, 512)], MANY, -2000),
        ([(0, 960)], [1024] * 6, 10_500),
        ([(0, 960)], [512] * 12, 10_500),  # the sum of contexts counts
        ([(0, 960)], [512] * 4, 4500),  # from nothing without
        ([(0, 960)], [1024] * 32, 12_000),  # stays
        ([(0, 960)], [], 0),
        ([], MANY, 0),
    ],
)
def test_prompts_beside_decodes_take_what_was_measured_more(folder, formula, chunks, contexts, more_ns):
    work, cost = step(chunks, contexts), model(folder, contents(beside=BESIDE))
    (found,), (without,) = cost.stage_ns(work), formula.stage_ns(work)
    assert found - without == pytest.approx(more_ns, abs=2)
    parts, others = cost.components(work), formula.components(work)
    assert parts["decode_attention"][0] - others["decode_attention"][0] == pytest.approx(more_ns, abs=2)
    assert cost.notes == []


def test_prompts_beside_decodes_elsewhere(folder):
    work = step([(0, 960)], MANY)
    stages, alone = (model(folder, each, parallel=Parallel(pp=2)) for each in (contents(beside=BESIDE), contents()))
    more_ns = [one - other for one, other in zip(stages.stage_ns(work), alone.stage_ns(work), strict=True)]
    assert more_ns == pytest.approx([12_000 * 15 / 28, 12_000 * 13 / 28], abs=2), "by their layers"
    other, without = (model(folder, each, gpu="l4") for each in (contents(beside=BESIDE), contents()))
    assert other.stage_ns(work) == without.stage_ns(work), "what was beyond one GPU's tables is not another's"


@pytest.mark.parametrize("num_decode", [3, 9, 33])
def test_without_graphs_decodes_are_between_the_points(folder, num_decode):
    values = contents(graph_sizes=[], graph_head=None)
    cost, contexts = model(folder, values), [50] * num_decode
    layers, head = stamped(contexts=contexts, num_sampled=num_decode, graphs=False)
    assert cost.stage_ns(step(contexts=contexts)) == pytest.approx([layers + head], abs=1)
    assert cost.notes == []


def test_decodes_beyond_the_largest_graph_are_launched_one_by_one(folder):
    decode = {"batches": [1, 2, 3, 64], "ns": [400_000, 401_000, 502_000, 563_000]}
    cost = model(folder, contents(graph_sizes=[1, 2], decode=decode))
    # between the points, not padded; the eager step's head and gap
    many, few = step(contexts=[16] * 8), step(contexts=[16] * 2)
    assert (cost.stage_ns(many), cost.gap_ns(many)) == ([507_000 + profiles.head(8)], 900)
    assert (cost.stage_ns(few), cost.gap_ns(few)) == ([401_000 + profiles.graph_head(2)], 700)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (1, 380_000),  # as 16
        (16, 380_000),
        (17, 460_000),  # as 32
        (100, 940_000),  # as 128
        (128, 940_000),
        (129, 1_200_000),  # the host's pace from here on
        (145, 1_200_000),
        (208, 1_440_000),
    ],
)
def test_chunks_are_padded_by_hand_and_launched_one_by_one_beyond_the_largest_graph(folder, num_tokens, expected):
    chunks = [(0, 16)] * (num_tokens // 16) + [(0, 1)] * (num_tokens % 16)
    cost, work = model(folder), step(chunks, num_sampled=0)
    assert cost.components(work)["gemm"] == [expected]
    assert cost.gap_ns(work) == profiles.CHUNKED_GAP


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "expected"),
    [
        (128, 9, 5000 + 1600),  # a graph's, of 16 rows
        (128, 64, 5000 + 6400),
        (128, 65, 10_000 + 6500),  # more rows than any
        (129, 9, 5000 + 1600),  # behind a step that is none, too
        (128, 0, 0),
        (129, 0, 0),
    ],
)
def test_a_head_is_a_graph_as_far_as_there_are_any(folder, num_tokens, num_rows, expected):
    cost = model(folder, contents(head={"rows": [1, 100], "ns": [10_100, 20_000]}))
    work = step([(0, 64), (0, num_tokens - 64)], num_sampled=num_rows)
    assert cost.components(work)["head"] == [expected]
    assert cost.stage_ns(work) == [
        int(profiles.tokens(num_tokens) + cost.components(work)["prefill_attention"][0]) + expected
    ]
    assert cost.notes == []


def test_where_no_head_was_measured_outside_of_graphs_it_is_theirs(folder):
    cost = model(folder, contents(head=None))
    (found,) = cost.components(step([(0, 300)], num_sampled=65))["head"]
    assert found > 5000 + 6400
    assert cost.notes == [f"profile formula: {scaled_note('the head', 'more', 'rows')}"]


def test_without_token_graphs_steps_are_between_the_points(folder):
    cost = model(folder, contents(token_graph_sizes=[]))
    assert cost.components(step([(0, 24)], num_sampled=3)) == {
        **cost.components(step([(0, 24)], num_sampled=0)),
        "gemm": [420_000],
        "head": [5400],
    }


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(16, 1000), (17, 1100), (32, 2000), (33, 3000), (49, 4600), (64, 6100), (65, 8000)]
)
def test_a_graph_measured_with_fewer_than_its_size_takes_what_lies_between(folder, num_tokens, expected):
    """As where padding visits no expert. Nothing is read from the graph below: of 32 the least is that of 31."""
    points = {"tokens": [16, 31, 32, 33, 64, 128], "ns": [1000, 1100, 2000, 3000, 6100, 8000]}
    cost = model(folder, contents(tokens=points))
    found = cost.components(step([(0, num_tokens)], num_sampled=0))["gemm"]
    assert found == pytest.approx([expected])


def test_decodes_too_lie_between_what_was_measured_of_their_graph(folder):
    points = {"batches": [1, 2, 3, 4, 8], "ns": [100, 200, 210, 300, 500]}
    cost = model(folder, contents(decode=points, graph_sizes=[1, 2, 4, 8]))
    gemm = [cost.components(step(contexts=[16] * num))["gemm"] for num in (2, 3, 4, 5, 8)]
    assert gemm == [[200], [210], [300], [500], [500]]


def test_a_table_may_end_within_graphs(folder):
    cost = model(folder, contents(tokens={"tokens": [16, 32, 64, 128], "ns": [1000, 2000, 4000, 8000]}))
    assert cost.components(step([(0, 64)] * 2, num_sampled=1))["gemm"] == [8000]
    assert cost.notes == []
    more = cost.components(step([(0, 64)] * 32, num_sampled=1))
    assert 12_000 < more["gemm"][0] < 8000 * 16
    assert more["head"] == [5100]
    assert cost.notes == [f"profile formula: {scaled_note('steps', 'more', 'tokens')}"]


# --- stages ----------------------------------------------------------------------------------------------------

WORKS = [
    step(contexts=[100] * 9),
    step([(512, 64)], num_sampled=0),
    step([(0, 100), (10, 64)], [50, 60], num_sampled=3),
]


@pytest.mark.parametrize("work", WORKS)
def test_stages_share_by_their_layers(folder, formula, work):
    split = model(folder, parallel=Parallel(pp=4, pp_layers=(4, 6, 8, 10)))
    whole, head = formula.components(work), formula.components(work)["head"][0]
    layers = whole["gemm"][0] + whole["prefill_attention"][0] + whole["decode_attention"][0]
    times = [layers * share / 28 for share in (4, 6, 8, 10)]
    times[-1] += head
    assert split.stage_ns(work) == pytest.approx(times, abs=1)
    assert (split.num_stages, split.host_ns, split.return_ns) == (4, 11_000, 22_000)
    assert split.gap_ns(work) == (profiles.CHUNKED_GAP if work.num_prefill_tokens else profiles.DECODE_GAP)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_components_add_up_to_the_stage(folder, work, pp):
    cost = model(folder, parallel=Parallel(pp=pp))
    parts = cost.components(work)
    assert tuple(parts) == COMPONENTS
    for stage, whole in enumerate(cost.stage_ns(work)):
        assert sum(part[stage] for part in parts.values()) == pytest.approx(whole, abs=1.01)
    assert parts["all_reduce"] == parts["other"] == [0.0] * pp
    assert parts["head"][:-1] == [0.0] * (pp - 1)


def test_what_the_components_are(formula):
    parts = formula.components(step([(0, 100), (10, 64)], [16, 16], num_sampled=3))
    assert parts["gemm"] == [profiles.tokens(166)]
    assert parts["decode_attention"] == [profiles.mixed(2, 16)]
    assert parts["prefill_attention"] == [pytest.approx(profiles.each(100, 0) + profiles.each(64, 10))]
    assert parts["head"] == [profiles.graph_head(4)]
    assert parts["launch"] == [0.0]


def test_transfers(folder):
    work = step([(0, 100)], [5])
    assert model(folder, two_stages()).transfer_ns(work) == 0  # a single stage
    cost = model(folder, two_stages(), parallel=Parallel(pp=2))
    assert cost.transfer_ns(work) == 2000 + 3 * 101
    assert cost.notes == []
    other = model(folder, parallel=Parallel(pp=2))
    assert other.transfer_ns(work) == Roofline(shape=SHAPE, gpu=H200, parallel=Parallel(pp=2)).transfer_ns(work)
    assert other.notes == [
        "profile formula: transfers between stages are the roofline's: the profile was made with one stage"
    ]


# --- beyond the tables -----------------------------------------------------------------------------------------


def beyond(folder, work, values=None, **options):
    """What a fresh model says, and its notes without the profile's name."""
    cost = model(folder, values, **options)
    (time_ns,) = cost.stage_ns(work)
    assert cost.stage_ns(work) == [time_ns]
    return time_ns, [note.removeprefix("profile formula: ") for note in cost.notes]


def scaled_note(part, side, unit):
    return f"{part} of {side} {unit} than measured: the roofline's, scaled to the nearest measured point"


def test_longer_contexts_than_measured(folder):
    ratio = roofline_ns("decode_attention", contexts=[9000] * 2) / roofline_ns("decode_attention", contexts=[4096] * 2)
    time_ns, notes = beyond(folder, step(contexts=[9000] * 2))
    assert time_ns == pytest.approx(
        400_000 + profiles.decode_attention(2, 4096) * ratio + profiles.graph_head(2), abs=1
    )
    assert notes == [scaled_note("decode attention", "more", "tokens of context")]


@pytest.mark.parametrize("context", [1500, 4096])
def test_contexts_that_did_not_fit(folder, context):
    figures = [roofline_ns("decode_attention", contexts=[length] * 64) for length in (4096, 1024)]
    filled = profiles.decode_attention(64, 1024) * figures[0] / figures[1]
    share = (context - 1024) / (4096 - 1024)
    expected = profiles.decode_attention(64, 1024) * (1 - share) + filled * share
    time_ns, notes = beyond(folder, step(contexts=[context] * 64))
    assert time_ns == pytest.approx(456_000 + expected + profiles.graph_head(64), abs=1)
    assert notes == [scaled_note("decode attention", "more", "tokens of context")]


def test_between_a_row_that_was_measured_and_one_that_was_not(folder):
    figures = [roofline_ns("decode_attention", contexts=[length] * 64) for length in (4096, 1024)]
    filled = profiles.decode_attention(64, 1024) * figures[0] / figures[1]
    time_ns, notes = beyond(folder, step(contexts=[4096] * 48))
    expected = (profiles.decode_attention(32, 4096) + filled) / 2
    assert time_ns == pytest.approx(456_000 + expected + profiles.graph_head(64), abs=1)
    assert notes == [scaled_note("decode attention", "more", "tokens of context")]


def test_more_sequences_than_measured_beside_a_chunk(folder):
    chunk, contexts = (0, 64), [16] * 128
    time_ns, notes = beyond(folder, step([chunk], contexts, num_sampled=0))
    assert time_ns == pytest.approx(
        profiles.tokens(192) + 2 * profiles.mixed(64, 16), abs=1
    )  # in proportion to their keys
    assert notes == [
        scaled_note("mixed steps", "more", "sequences"),
        scaled_note("decode attention", "more", "sequences"),
    ]


def test_longer_transfers_than_measured(folder):
    parallel = Parallel(pp=2)
    cost = model(folder, two_stages(), parallel=parallel)
    rooflines = [
        Roofline(shape=SHAPE, gpu=H200, parallel=parallel).transfer_ns(step([(0, num)])) for num in (3000, 1024)
    ]
    assert cost.transfer_ns(step([(0, 3000)])) == pytest.approx(5072 * rooflines[0] / rooflines[1], abs=1)
    assert cost.notes == [f"profile formula: {scaled_note('transfers', 'more', 'tokens')}"]


def test_more_sequences_than_measured(folder):
    time_ns, notes = beyond(folder, step(contexts=[256] * 100), contents(graph_sizes=[], graph_head=None))
    base = [ROOFLINE.stage_ns(step(contexts=[16] * num, num_sampled=0))[0] for num in (100, 64)]
    attention = [roofline_ns("decode_attention", contexts=[256] * num) for num in (100, 64)]
    head = [roofline_ns("head", contexts=[1], num_sampled=num) for num in (100, 64)]
    expected = (
        profiles.decode(64) * base[0] / base[1]
        + profiles.decode_attention(64, 256) * attention[0] / attention[1]
        + profiles.head(64) * head[0] / head[1]
    )
    assert time_ns == pytest.approx(expected, rel=1e-5)
    assert notes == [
        scaled_note("decode steps", "more", "sequences"),
        scaled_note("decode attention", "more", "sequences"),
        scaled_note("the head", "more", "rows"),
    ]


def test_more_tokens_than_measured(folder):
    chunks = [(0, 1024), (0, 512)]
    time_ns, notes = beyond(folder, step(chunks, num_sampled=0))
    base = [ROOFLINE.stage_ns(step([(0, 64)] * num, num_sampled=0))[0] for num in (24, 16)]
    alone, together = profiles.one(1024, 0), profiles.each(1024, 0) + profiles.each(512, 0)
    assert time_ns == pytest.approx(profiles.tokens(1024) * base[0] / base[1] + max(alone, together), rel=1e-5)
    assert notes == [scaled_note("steps", "more", "tokens")]


@pytest.mark.parametrize(
    ("chunk", "nearest", "notes"),
    [
        ((512, 8), (512, 16), [("fewer", "tokens in a chunk")]),
        ((9000, 64), (2048, 64), [("more", "tokens before a chunk")]),
        ((9000, 8), (2048, 16), [("fewer", "tokens in a chunk"), ("more", "tokens before a chunk")]),
    ],
)
def test_chunks_beyond_the_table(folder, chunk, nearest, notes):
    time_ns, told = beyond(folder, step([chunk], num_sampled=0))
    ratio = roofline_ns("prefill_attention", [chunk]) / roofline_ns("prefill_attention", [nearest])
    expected = profiles.tokens(chunk[1]) + profiles.one(nearest[1], nearest[0]) * ratio
    assert time_ns == pytest.approx(expected, abs=1)
    assert told == [scaled_note("prefill attention", *note) for note in notes]


def test_a_longer_chunk_than_measured(folder):
    time_ns, notes = beyond(folder, step([(512, 900)], num_sampled=0), contents(prefill_attention=SHORT_CHUNKS))
    ratio = roofline_ns("prefill_attention", [(512, 900)]) / roofline_ns("prefill_attention", [(512, 256)])
    assert time_ns == pytest.approx(profiles.tokens(900) + profiles.one(256, 512) * ratio, abs=1)
    assert notes == [scaled_note("prefill attention", "more", "tokens in a chunk")]


SHORT_CHUNKS = {
    "queries": [64, 256],
    "starts": [0, 512],
    "one_ns": profiles.table(profiles.one, [64, 256], [0, 512]),
    "each_ns": profiles.table(profiles.each, [64, 256], [0, 512]),
}


def test_what_did_not_fit_of_several_chunks_is_told(folder):
    # `one` was measured there, `each` was not
    _, notes = beyond(folder, step([(2048, 256), (0, 64)], num_sampled=0))
    assert notes == [scaled_note("prefill attention", "more", "tokens before a chunk")]


def test_a_note_is_told_once_a_part_and_side(folder):
    cost = model(folder)
    for num in range(1, 30):
        cost.stage_ns(step([(9000 + num, 64)], [5000] * num))
        cost.stage_ns(step(contexts=[8] * num))
    assert cost.notes == [
        f"profile formula: {scaled_note(*parts)}"
        for parts in (
            ("decode attention", "more", "tokens of context"),
            ("prefill attention", "more", "tokens before a chunk"),
            ("decode attention", "fewer", "tokens of context"),
        )
    ]


# --- order -----------------------------------------------------------------------------------------------------


@given(
    num=st.integers(1, 80),
    context=st.integers(16, 9000),
    extra=st.integers(0, 40),
    longer=st.integers(0, 2000),
    pp=st.sampled_from([1, 3]),
)
@settings(max_examples=150, deadline=None)
def test_more_decodes_are_never_cheaper(models, *, num, context, extra, longer, pp):
    cost = models[pp]
    less, more = step(contexts=[context] * num), step(contexts=[context + longer] * (num + extra))
    assert all(a <= b for a, b in zip(cost.stage_ns(less), cost.stage_ns(more), strict=True))


@given(
    start=st.integers(0, 3000),
    num=st.integers(64, 2000),
    further=st.integers(0, 3000),
    more=st.integers(0, 500),
    pp=st.sampled_from([1, 3]),
)
@settings(max_examples=150, deadline=None)
def test_longer_chunks_are_never_cheaper(models, *, start, num, further, more, pp):
    cost = models[pp]
    small, large = step([(start, num)]), step([(start + further, num + more)])
    assert all(a <= b for a, b in zip(cost.stage_ns(small), cost.stage_ns(large), strict=True))


@pytest.fixture(scope="module")
def models(folder):
    return {pp: model(folder, parallel=Parallel(pp=pp)) for pp in (1, 3)}


def test_no_step_at_the_edge_of_a_table(folder):
    cost = model(folder)
    for works in (
        [step(contexts=[context] * 3) for context in range(4090, 4102)],
        [step([(start, 64)]) for start in range(2042, 2054)],
        [step([(0, num)]) for num in range(1019, 1030)],
    ):
        times = [cost.stage_ns(work)[0] for work in works]
        steps = [after - before for before, after in pairwise(times)]
        assert max(steps) < 3 * max(min(steps), 50)


# --- another GPU -----------------------------------------------------------------------------------------------


def test_another_gpu_is_scaled_by_the_rooflines(folder):
    cost, slower = model(folder), Roofline(shape=SHAPE, gpu=get_gpu("l4"), constants=WORK)
    other = model(folder, gpu="l4")
    assert other.notes == ["profile formula: times are an estimate: measured on h200, scaled to l4 by their rooflines"]
    work = step(contexts=[1024] * 8)
    ours, theirs = cost.components(work), other.components(work)
    for name in ("head", "decode_attention"):
        ratio = slower.components(work)[name][0] / ROOFLINE.components(work)[name][0]
        assert theirs[name][0] == pytest.approx(ours[name][0] * ratio, rel=0.02)
    base = [each.stage_ns(step(contexts=[16] * 8, num_sampled=0))[0] for each in (slower, ROOFLINE)]
    assert theirs["gemm"][0] == pytest.approx(ours["gemm"][0] * base[0] / base[1], rel=1e-4)
    assert theirs["launch"] == ours["launch"]
    assert (other.host_ns, other.return_ns) == (cost.host_ns, cost.return_ns)


@pytest.mark.parametrize("chunk", [(0, 1024), (512, 256), (2048, 64)])
def test_chunks_on_another_gpu(folder, chunk):
    work, cost, other = step([chunk]), model(folder), model(folder, gpu="l4")
    slower = Roofline(shape=SHAPE, gpu=get_gpu("l4"), constants=WORK)
    name = "prefill_attention"
    ratio = slower.components(work)[name][0] / ROOFLINE.components(work)[name][0]
    assert other.components(work)[name][0] == pytest.approx(cost.components(work)[name][0] * ratio, rel=1e-9)
    base = step([(0, 64)] * (chunk[1] // 64), num_sampled=0)
    ratio = slower.stage_ns(base)[0] / ROOFLINE.stage_ns(base)[0]
    assert other.components(work)["gemm"][0] == pytest.approx(cost.components(work)["gemm"][0] * ratio, rel=1e-5)


def test_a_mixed_step_on_another_gpu(folder):
    work = step([(512, 64)] * 3, [16] * 4, num_sampled=0)
    ours, theirs = model(folder).components(work), model(folder, gpu="l4").components(work)
    slower = Roofline(shape=SHAPE, gpu=get_gpu("l4"), constants=WORK)
    for name in ("prefill_attention", "decode_attention"):
        ratio = slower.components(work)[name][0] / ROOFLINE.components(work)[name][0]
        assert theirs[name][0] == pytest.approx(ours[name][0] * ratio, rel=1e-9)


def test_transfers_on_another_gpu(folder):
    parallel, work = Parallel(pp=2), step([(0, 64)])
    other = model(folder, two_stages(), gpu="l4", parallel=parallel)
    rooflines = [
        Roofline(shape=SHAPE, gpu=get_gpu(name), parallel=parallel).transfer_ns(work) for name in ("l4", "h200")
    ]
    assert other.transfer_ns(work) == pytest.approx(2192 * rooflines[0] / rooflines[1], abs=1)
    assert model(folder, two_stages(), gpu="l4").transfer_ns(work) == 0


def test_a_device_without_a_data_sheet_is_taken_as_it_is(folder, formula):
    cost = model(folder, contents(gpu=None, device="cpu"), gpu="l4")
    assert cost.stage_ns(WORKS[0]) == formula.stage_ns(WORKS[0])
    assert cost.notes == ["profile formula: cpu has no data sheet; beyond the tables the roofline is that of l4"]


# --- the clock -------------------------------------------------------------------------------------------------


def test_a_load_is_a_steps_times_and_what_the_clock_has_to_know(folder):
    cost = model(folder, contents(clock=CLOCK), parallel=Parallel(pp=2))
    for work in [*WORKS, step([(0, 1024)]), step([(0, 500)], [700] * 64)]:
        load = cost.load(work)
        assert load.stage_ns == cost.stage_ns(work)
        assert load.stage_ns is not cost.load(work).stage_ns
        parts = cost.components(work)
        arithmetic = [base + prefill for base, prefill in zip(parts["gemm"], parts["prefill_attention"], strict=True)]
        assert load.stretched_ns == pytest.approx(arithmetic), "decodes' attention and the head are not stretched"
        best, num_tokens = 1024 / profiles.tokens(1024), work.num_prefill_tokens + work.num_decode_tokens
        sizes = profiles.TOKEN_GRAPHS if work.num_prefill_tokens else profiles.GRAPHS
        computed = profiles.padded(num_tokens, sizes) if num_tokens <= sizes[-1] else num_tokens
        drawn = min(sum(parts["gemm"]), computed / best) + sum(parts["prefill_attention"])
        drawn += 0.5 * sum(parts["decode_attention"])
        layers_ns = sum(sum(row) for name, row in parts.items() if name != "head")
        assert load.power == pytest.approx(drawn / layers_ns)
    assert model(folder).load(WORKS[0]) is None


def test_the_largest_step_draws_most(folder):
    cost = model(folder, contents(clock=CLOCK))
    assert cost.load(step([(0, 64)] * 16, num_sampled=0)).power == pytest.approx(1.0)
    assert cost.load(step(contexts=[16])).power < 0.1


@pytest.mark.parametrize(("num", "computed"), [(33, 33), (50, 50), (64, 64), (65, 128), (128, 128)])
def test_padding_draws_where_it_costs_what_tokens_do(folder, num, computed):
    """The graph of 64 tokens was measured with fewer, too; that of 128 was not."""
    at = [16, 32, 33, 64, 128, 1024]
    points = {"tokens": at, "ns": [profiles.tokens(each) - (each == 33) * 4000 for each in at]}
    cost, work = model(folder, contents(clock=CLOCK, tokens=points)), step([(0, num)], num_sampled=0)
    (base,), (prefill,) = (cost.components(work)[name] for name in ("gemm", "prefill_attention"))
    drawn = computed * profiles.tokens(1024) / 1024 + prefill
    assert cost.load(work).power == pytest.approx(drawn / (base + prefill))


@pytest.mark.parametrize(("num", "at_best_rate"), [(64, 1.5), (160, 1.1), (256, 0.7), (640, 0.85), (1024, 1)])
def test_sizes_draw_what_the_profile_says_of_them(folder, num, at_best_rate):
    plain, sized = (model(folder, contents(clock=clock)) for clock in (CLOCK, SIZED_CLOCK))
    work = step([(0, 64)] * (num // 64) + [(0, num % 64)] * (num % 64 > 0), num_sampled=0)
    rate = num * profiles.tokens(1024) / (1024 * profiles.tokens(num))
    assert plain.load(work).power == pytest.approx(min(rate, 1.0))
    assert sized.load(work).power == pytest.approx(min(rate * at_best_rate, 1.0))
    assert sized.load(work).stage_ns == plain.load(work).stage_ns


def test_attention_of_chunks_and_of_decodes_draws_less(folder):
    cost = model(folder, contents(clock=SIZED_CLOCK))
    for work, part, drawn, at_best_rate in (
        (step([(2048, 64)], num_sampled=0), "prefill_attention", 0.6, 1.5),
        (step(contexts=[1024] * 64), "decode_attention", 0.5, 1.2),
    ):
        parts = {name: sum(row) for name, row in cost.components(work).items() if name != "head"}
        base = min(at_best_rate * 64 * profiles.tokens(1024) / 1024, parts["gemm"])  # of 64 tokens
        layers_ns = parts["gemm"] + parts[part]
        assert layers_ns == pytest.approx(sum(parts.values()))
        assert parts[part] > layers_ns / 20
        assert cost.load(work).power == pytest.approx((base + drawn * parts[part]) / layers_ns)


@pytest.mark.parametrize("gpu", ["h200", None])
def test_another_gpu_is_taken_to_have_the_same_clock(folder, gpu):
    ours, theirs = (model(folder, contents(clock=CLOCK, gpu=gpu), gpu=name) for name in ("h200", "h100"))
    assert ours.clock == theirs.clock is not None
    work = step([(0, 1024)])
    assert theirs.load(work).power == pytest.approx(ours.load(work).power, rel=0.05)


def test_tables_without_times_are_no_error(folder):
    """As those of docs/profile.md, which are all zeros."""
    points = profiles.TOKENS
    cost = model(folder, contents(clock=CLOCK, tokens={"tokens": points, "ns": [0] * len(points)}))
    for work in WORKS:
        assert 0.0 <= cost.load(work).power <= 1.0


def test_checks_are_rested(tmp_path):
    assert residuals(profile(tmp_path, contents(clock=CLOCK))) == residuals(profile(tmp_path))


# --- what it is used for ---------------------------------------------------------------------------------------


def test_residuals(tmp_path):
    found = residuals(profile(tmp_path))
    errors = [1_366_204 / 1_000_000 - 1, 407_152 / 400_000 - 1]  # by hand
    assert (found.num_checks, found.mean, found.worst) == (2, pytest.approx(sum(errors) / 2), pytest.approx(errors[0]))
    assert residuals(profile(tmp_path, contents(checks=[]))) is None
    low = {"chunks": [], "contexts": [700], "num_sampled": 1, "stage_ns": [300_000, 514_304]}
    found = residuals(profile(tmp_path, {**two_stages(), "checks": [low]}))  # of both stages together
    assert (found.mean, found.worst) == (pytest.approx(-0.5), pytest.approx(-0.5))


def test_times_are_integers_and_do_not_depend_on_what_was_asked_before(folder):
    forward, backward = model(folder, parallel=Parallel(pp=2)), model(folder, parallel=Parallel(pp=2))
    works = [step([(num, 20 + num)], [num + 16] * num) for num in range(1, 40)]
    times = [forward.stage_ns(work) for work in works]
    assert times == [backward.stage_ns(work) for work in works[::-1]][::-1]
    assert all(type(time_ns) is int for row in times for time_ns in row)
    assert all(type(time_ns) is int for time_ns in (*forward.stage_ns(WORKS[0]), forward.transfer_ns(WORKS[0])))


def test_a_model_survives_pickling(folder):
    cost = model(folder, parallel=Parallel(pp=4))
    copy = pickle.loads(pickle.dumps(cost))  # noqa: S301 - our own bytes
    assert [copy.stage_ns(work) for work in WORKS] == [cost.stage_ns(work) for work in WORKS]


CHAT = TraceOptions(source="chat", limit=40)


def config(path, pp):
    return SimConfig(model=profiles.MODEL, profile=str(path), parallel=Parallel(pp=pp), num_blocks=2000, trace=CHAT)


@pytest.mark.parametrize("clock", [None, CLOCK, SIZED_CLOCK])
@pytest.mark.parametrize("pp", [1, 3])
def test_a_whole_run(folder, pp, clock):
    case = config(written(folder, contents(clock=clock)), pp)
    one = simulate(case, CHAT.load(), digest=True, pipeline=ProcessPipeline)
    other = simulate(case, CHAT.load(), digest=True)
    assert one.decision_sha256 == other.decision_sha256
    for column in ("requests", "batches", "stage_start_ns", "stage_end_ns", "done_ns"):
        assert (getattr(one, column) == getattr(other, column)).all()
    summary = summarize(other, slo_ttft_s=None, slo_tpot_s=None)
    assert summary["num_finished"] == 40
    told = summary["config"]
    assert told["cost_model"] == "profile formula, 2026-11-22, NVIDIA H200"
    assert json.loads(json.dumps(told)) == told
    assert any("prefill attention of fewer" in note for note in told["profile_notes"])


def test_the_first_step_of_a_run_is_the_profiles(folder):
    case = replace(config(written(folder), 1), policy="orca")  # the whole prompt at once
    record = simulate(case, TraceOptions(source="chat", limit=1).load())
    first = record.batches[0]
    layers, head = stamped([(0, int(first["num_prefill_tokens"]))], num_sampled=1)
    assert record.stage_end_ns[0, 0] - record.stage_start_ns[0, 0] == pytest.approx(layers + head, abs=1)
    assert record.stage_start_ns[0, 0] == record.requests[0]["arrival_ns"] + profiles.DISPATCH


def test_the_model_may_be_given_as_a_shape(folder):
    case = replace(config(written(folder), 1), model=SHAPE)
    assert case.resolve().to_json()["model_source"] == profiles.MODEL
    assert isinstance(case.resolve().cost, Profiled)


def test_a_clock_makes_steps_longer_and_the_more_in_dense_traffic(folder):
    ratios = []
    for rate in (1.0, 100.0):
        trace = replace(CHAT, rate_scale=rate).load()
        records = [simulate(config(written(folder, contents(clock=clock)), 1), trace) for clock in (CLOCK, None)]
        clocked, plain = ((each.stage_end_ns - each.stage_start_ns).sum() for each in records)
        ratios.append(clocked / plain)
    assert 1.0 <= ratios[0] < ratios[1] < 1.2
