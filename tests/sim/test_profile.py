"""Files of profiles: what is read, every mistake its line, which one is chosen, and what commands say of it."""

import json
from dataclasses import replace

import pytest
from sim.profiles import CHUNK_KERNEL, CLOCK, SHAPE, SIZED_CLOCK, contents, profile, two_stages, written
from sim.test_cli import call

from gllm.chunk_schedule import ChunkKernel
from gllm.gpu_clock import GpuClock, PowerLimit
from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.sim import profile as profile_module
from gllm.sim.profile import find_profile, list_profiles, read_profile


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A folder that stands for the packaged one."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    monkeypatch.setattr(profile_module, "PROFILES", folder)
    return folder


# --- reading ---------------------------------------------------------------------------------------------------


def test_a_file_is_read_whole(tmp_path):
    read = profile(tmp_path)
    assert (read.name, read.gpu, read.device, read.date) == ("formula", "h200", "NVIDIA H200", "2026-11-22")
    assert replace(read.shape, name=SHAPE.name) == SHAPE
    assert (read.num_layers, read.base_chunk, read.parallel) == (28, 64, Parallel())
    assert (read.graph_sizes[-1], read.token_graph_sizes) == (64, (16, 32, 64, 128))
    assert read.tokens.at == (16, 32, 64, 128, 129, 160, 256, 512, 1024)
    assert read.decode_attention.ns[-1][-1] is None
    assert read.mixed.ns[0][0] < 0
    assert (read.dispatch_ns, read.return_ns, read.decode_gap_ns, read.chunked_gap_ns) == (11_000, 22_000, 700, 900)
    assert read.transfer is None
    assert read.checks[0].work.num_prefill_tokens == 164
    assert read.checks[0].work.decode_context == 340
    assert read.beside == profile(tmp_path, contents(beside=None)).beside == ()
    (step,) = profile(tmp_path, contents(beside=[BESIDE])).beside
    assert (step.work.num_prefill_tokens, step.work.decode_context, step.stage_ns) == (512, 340, (2_000_000,))


def test_what_may_be_left_out(tmp_path):
    values = contents(graph_sizes=[], token_graph_sizes=[], gpu=None)
    del values["graph_head"], values["transfer"]
    read = profile(tmp_path, values)
    assert (read.graph_head, read.transfer, read.graph_sizes, read.gpu) == (None, None, (), None)
    assert read.token_graph_sizes == ()
    read = profile(tmp_path, contents(head=None))
    assert read.head == read.graph_head


def test_a_clock_is_read_where_there_is_one(tmp_path):
    assert profile(tmp_path).clock is profile(tmp_path, contents(clock=None)).clock is None
    found = profile(tmp_path, contents(clock={**CLOCK, "tokens": "not read"})).clock
    limit = PowerLimit(tau_ns=2_000_000, slowdown=0.2, knee=0.3)
    assert found == GpuClock(limits=(limit,), attention=0.5), "an older file's"
    assert profile(tmp_path, contents(clock={**CLOCK, "knee": 0})).clock.limits[0].knee == 0.0
    second = PowerLimit(tau_ns=40_000_000, slowdown=0.05, knee=0.6)
    sized = {"tokens": (64, 256, 1024), "power": (1.5, 0.7, 1.0), "prefill": 0.6, "decode": 1.2}
    found = profile(tmp_path, contents(clock={**SIZED_CLOCK, "mean_error": "not read"})).clock
    assert found == GpuClock(limits=(limit, second), attention=0.5, **sized)
    assert profile(tmp_path, contents(clock={**SIZED_CLOCK, "prefill": 1})).clock.prefill == 1.0
    assert profile(tmp_path, contents(clock={**SIZED_CLOCK, "decode": None})).clock.decode is None


def test_a_chunk_kernel_is_read_with_what_steps_could_hold_where_there_is_one(tmp_path):
    read = profile(tmp_path)
    assert read.chunk_kernel is read.room is profile(tmp_path, contents(chunk_kernel=None)).chunk_kernel is None
    values = contents()
    del values["max_tokens"], values["num_blocks"]
    assert profile(tmp_path, values).room is None  # and these are not needed
    found = profile(tmp_path, contents(chunk_kernel=CHUNK_KERNEL, num_blocks=100))
    assert found.chunk_kernel == ChunkKernel(**CHUNK_KERNEL)
    assert found.room == (64, 1024, 100, 16)
    assert [found.room.num_each(*point) for point in ((16, 0), (64, 0), (100, 0), (16, 200), (1, 2000))] == [
        *(16, 16, 10),
        *(7, 1),  # blocks for no more
    ]


def test_rows_that_were_not_measured_at_all_are_left_out(tmp_path):
    table = {"batches": [1, 9], "contexts": [16, 32], "ns": [[0, 5], [None, None]]}
    assert profile(tmp_path, contents(decode_attention=table)).decode_attention.rows == (1,)


def changed(path, value):
    """The contents with one field, named by its path, set to `value`; removed if that is `...`."""
    values = json.loads(json.dumps(contents()))
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    last = int(last) if last.isdigit() else last
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


BESIDE = {"chunks": [[0, 512]], "contexts": [300, 40], "num_sampled": 3, "stage_ns": [2_000_000]}
WRONG = [
    ("format", "other", 'not a profile (its "format" is not "gllm-profile")'),
    ("version", 2, "field version is 2, known is 1"),
    ("version", ..., "field version is None, known is 1"),
    ("gpu", ..., "field gpu is missing"),
    ("gpu", "h900", "field gpu is 'h900'; known are a100-40g,"),
    ("device", 5, "field device is 5, not a text"),
    ("made", [], "field made is no object"),
    ("made.date", ..., "field made.date is missing"),
    ("layers", 0, "field layers holds 0, not a whole number of at least 1"),
    ("layers", 2.5, "field layers holds 2.5, not a whole number of at least 1"),
    ("layers", True, "field layers holds True, not a whole number"),
    ("base_chunk", ..., "field base_chunk is missing"),
    ("graph_sizes", [2, 1], "field graph_sizes must increase"),
    ("graph_sizes", None, "field graph_sizes is no list"),
    ("graph_sizes", [1, 3], "field decode.batches has no point at 3, which is in graph_sizes"),
    ("token_graph_sizes", ..., "field token_graph_sizes is missing"),
    ("token_graph_sizes", [16, 16], "field token_graph_sizes must increase"),
    ("token_graph_sizes", [16, 48, 64], "field tokens.tokens has no point at 48, which is in token_graph_sizes"),
    ("token_graph_sizes", [2048], "field tokens.tokens has no point at 2048, which is in token_graph_sizes"),
    ("parallel.tp", "2", "field parallel.tp holds '2', not a whole number"),
    ("parallel.ep", 3, "field parallel --ep 3 does not divide --tp 1"),
    ("model_shape.hidden_size", ..., "field model_shape.hidden_size is missing"),
    ("model_shape.hidden_size", "8", "field model_shape.hidden_size is '8', which no model's is"),
    ("model_shape.num_heads", -1, "field model_shape.num_heads is -1, which no model's is"),
    ("model_shape.moe_layers", [1, 1], "field model_shape.moe_layers must increase"),
    ("decode", ..., "field decode is missing"),
    ("decode.batches", [], "field decode.batches is empty"),
    ("decode.ns", [1], "field decode.ns has 1 times for 7 batches"),
    ("decode.ns", 7, "field decode.ns is no list"),
    ("tokens.tokens", [0, 64, 80, 256, 512, 1024], "field tokens.tokens holds 0, not a whole number of at least 1"),
    ("tokens.ns", [-1, 2, 3, 4, 5, 6, 7, 8, 9], "field tokens.ns holds -1, not a whole number of at least 0"),
    ("tokens.ns", [None, 2, 3, 4, 5, 6, 7, 8, 9], "field tokens.ns holds None, not a whole number of at least 0"),
    ("mixed.ns.0", [1, 10**16], "field mixed.ns holds 10000000000000000, not a whole number of nanoseconds"),
    ("mixed.contexts", ..., "field mixed.contexts is missing"),
    ("decode_attention.contexts", [16, 16, 20, 30], "field decode_attention.contexts must increase"),
    ("decode_attention.ns", [[0, 1, 2, 3]], "field decode_attention.ns must be one list for each of its 5 batches"),
    ("decode_attention.ns.2", [0, 1, 2], "field decode_attention.ns must have one time for each of its 4 contexts"),
    ("decode_attention.ns.1", [0, None, 2, 3], "field decode_attention.ns has a null before a time"),
    ("decode_attention.ns", [[None] * 4] * 5, "field decode_attention.ns holds no time"),
    ("decode_attention.ns.0", [0, 1.5, 2, 3], "field decode_attention.ns holds 1.5, not a whole number of nanoseconds"),
    ("prefill_attention.each_ns", ..., "field prefill_attention.each_ns is missing"),
    ("prefill_attention.starts", [-1, 0, 1], "field prefill_attention.starts holds -1"),
    ("head.rows", [1, 8], "field head.ns has 3 times for 2 rows"),
    ("head", 5, "field head is no object"),
    ("graph_head", [], "field graph_head is no object"),
    ("transfer", {"tokens": [1]}, "field transfer.ns is missing"),
    ("gap.chunked_ns", -5, "field gap.chunked_ns holds -5"),
    ("host.return_ns", ..., "field host.return_ns is missing"),
    ("clock", [1], "field clock is no object"),
    ("clock", {"slowdown": 0.2, "knee": 0.3, "attention": 0.5}, "field clock.tau_ns is missing"),
    ("clock", {"tau_ns": 1, "slowdown": 0.2, "knee": 0.3}, "field clock.attention is missing"),
    ("clock", {**CLOCK, "tau_ns": 0}, "field clock.tau_ns holds 0, not a whole number of at least 1"),
    ("clock", {**CLOCK, "tau_ns": 1.5}, "field clock.tau_ns holds 1.5, not a whole number of at least 1"),
    ("clock", {**CLOCK, "slowdown": True}, "field clock.slowdown is True, not a number from 0 to less than 1"),
    ("clock", {**CLOCK, "slowdown": -0.1}, "field clock.slowdown is -0.1, not a number from 0 to less than 1"),
    ("clock", {**CLOCK, "knee": 1.0}, "field clock.knee is 1.0, not a number from 0 to less than 1"),
    ("clock", {**CLOCK, "knee": float("nan")}, "field clock.knee is nan, not a number from 0 to less than 1"),
    ("clock", {**SIZED_CLOCK, "limits": {}}, "field clock.limits is no list"),
    ("clock", {**SIZED_CLOCK, "limits": [CLOCK, 1]}, "field clock.limits[1] is no object"),
    ("clock", {**SIZED_CLOCK, "limits": [{"tau_ns": 5}]}, "field clock.limits[0].slowdown is missing"),
    ("clock", {**SIZED_CLOCK, "tokens": [64, 64, 128]}, "field clock.tokens must increase from one to the next"),
    ("clock", {**SIZED_CLOCK, "tokens": []}, "field clock.tokens is empty"),
    ("clock", {**SIZED_CLOCK, "power": [1, 1]}, "field clock.power has 2 numbers for 3 tokens"),
    ("clock", {**SIZED_CLOCK, "power": 1}, "field clock.power is no list"),
    ("clock", {**SIZED_CLOCK, "power": [1, -0.5, 1]}, "field clock.power holds -0.5, not a number from 0"),
    ("clock", {**SIZED_CLOCK, "power": [1, 1, float("nan")]}, "field clock.power holds nan, not a number from 0"),
    ("clock", {**SIZED_CLOCK, "decode": "1"}, "field clock.decode holds '1', not a number from 0"),
    ("clock", {**SIZED_CLOCK, "prefill": 1.5}, "field clock.prefill is 1.5, not a number from 0 to 1"),
    ("chunk_kernel", [1], "field chunk_kernel is no object"),
    ("chunk_kernel", {**CHUNK_KERNEL, "tile": 0}, "field chunk_kernel.tile holds 0, not a whole number of at least 1"),
    ("chunk_kernel", {**CHUNK_KERNEL, "rows": "1"}, "field chunk_kernel.rows holds '1', not a whole number"),
    ("chunk_kernel", {"rows": 128, "tile": 64}, "field chunk_kernel.least_tiles is missing"),
    ("beside", {}, "field beside is no list"),
    ("beside", [{**BESIDE, "contexts": []}], "field beside[0] must hold decodes, and more than 64 tokens in chunks"),
    ("beside", [BESIDE, {**BESIDE, "chunks": [[0, 64]]}], "field beside[1] must hold decodes, and more than 64 tokens"),
    ("beside", [BESIDE, {**BESIDE, "contexts": [340]}], "field beside[1] holds as many tokens in chunks and contexts"),
    ("beside", [{**BESIDE, "stage_ns": []}], "field beside[0].stage_ns has 0 times for 1 stages"),
    ("checks", {}, "field checks is no list"),
    ("checks.0", 5, "field checks[0] is no object"),
    ("checks.0.chunks", None, "field checks[0].chunks is no list"),
    ("checks.0.chunks", [[1, 2, 3]], "field checks[0].chunks must hold pairs"),
    ("checks.0.chunks", [[1, 0]], "field checks[0].chunks must hold pairs"),
    ("checks.0.contexts", [0], "field checks[0].contexts holds 0"),
    ("checks.1.contexts", [], "field checks[1] has neither chunks nor contexts"),
    ("checks.1.stage_ns", [1, 2], "field checks[1].stage_ns has 2 times for 1 stages"),
    ("checks.1.num_sampled", ..., "field checks[1].num_sampled is missing"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), WRONG, ids=[f"{path}={value!r}" for path, value, _ in WRONG])
def test_a_mistake_is_one_line(tmp_path, path, value, complaint):
    file = written(tmp_path, changed(path, value))
    with pytest.raises(ValueError, match="formula") as caught:
        read_profile(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: {complaint}")
    assert text.endswith("write it anew with python -m gllm.runtime profile")
    assert "\n" not in text


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_file_of_another_kind_is_told(tmp_path, data):
    path = tmp_path / "other.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"other\.json: not (valid JSON|a profile)"):
        read_profile(path)


# --- choosing --------------------------------------------------------------------------------------------------


def test_a_file_is_found_by_its_path(tmp_path, packaged):
    path = written(tmp_path)
    assert find_profile(str(path), SHAPE, "h200", Parallel(pp=4)).name == "formula"
    assert find_profile(str(path), SHAPE, "h100", Parallel()).gpu == "h200"  # the cost model scales it
    assert find_profile("none", SHAPE, "h200", Parallel()) is None
    with pytest.raises(ValueError, match=r"profile missing\.json: no such file; packaged profiles: none"):
        find_profile("missing.json", SHAPE, "h200", Parallel())
    written(packaged, name="known")
    assert find_profile("known", SHAPE, "h200", Parallel()).name == "known"
    with pytest.raises(ValueError, match="no such file; packaged profiles: known"):
        find_profile(str(tmp_path), SHAPE, "h200", Parallel())


@pytest.mark.parametrize(
    ("shape", "parallel", "complaint"),
    [
        (load_shape("qwen3-8b"), Parallel(), "whose hidden_size is 1024, not 4096 as qwen3-8b's"),
        (SHAPE, Parallel(tp=2), "it was made with tp 1, the run has --tp 2; choose another one, or --profile none"),
    ],
)
def test_a_file_that_does_not_fit_is_told(tmp_path, shape, parallel, complaint):
    with pytest.raises(ValueError, match=complaint):
        find_profile(str(written(tmp_path)), shape, "h200", parallel)


def test_auto_takes_the_one_that_fits(packaged):
    assert find_profile("auto", SHAPE, "h200", Parallel()) is None
    later = {"date": "2027-01-01"}
    written(packaged, contents(gpu="h100", made=later), "other-gpu")
    written(packaged, contents(gpu=None, made=later), "no-gpu")
    written(packaged, contents(parallel={"pp": 1, "tp": 2, "ep": 1}, made=later), "other-tp")
    shape = {**contents()["model_shape"], "hidden_size": 2048}
    written(packaged, contents(model_shape=shape, made=later), "other-model")
    assert find_profile("auto", SHAPE, "h200", Parallel()) is None
    written(packaged, contents(), "old")
    written(packaged, contents(made={"date": "2026-12-01"}), "new")
    written(packaged, two_stages(), "staged")
    assert find_profile("auto", SHAPE, "h200", Parallel()).name == "new"
    assert find_profile("auto", SHAPE, "h200", Parallel(pp=2)).name == "staged"
    assert find_profile("auto", SHAPE, "h200", Parallel(pp=4)).name == "new"
    assert find_profile("auto", SHAPE, "h100", Parallel()).name == "other-gpu"
    names = ["new", "no-gpu", "old", "other-gpu", "other-model", "other-tp", "staged"]
    assert [each.name for each in list_profiles()] == names


# --- commands --------------------------------------------------------------------------------------------------

RUN = ["chat", "--model", "qwen3-0.6b", "--limit", 5, "--no-iterations", "--pp", 1, "--max-model-len", 2048]


def test_profiles_are_listed(capsys, packaged):
    status, out, err = call(capsys, "profiles")
    assert (status, err) == (0, "")
    assert (
        out == "no profiles come with this version; python -m gllm.runtime profile writes one, --profile FILE uses it\n"
    )
    written(packaged, name="a")
    written(packaged, two_stages(gpu=None), name="b")
    status, out, _ = call(capsys, "profiles")
    assert status == 0
    text = " ".join(out.split())
    assert "NVIDIA H200 2026-11-22 mean +19.2%, worst +36.6%" in text
    assert "none made" in text


def test_a_replay_says_whose_times_they_are(capsys, tmp_path):
    path = written(tmp_path)
    status, out, err = call(capsys, "replay", *RUN, "--json", "--profile", path)
    config = json.loads(out)["config"]
    assert status == 0
    assert config["cost_model"] == "profile formula, 2026-11-22, NVIDIA H200"
    assert config["profile_residuals"]["num_checks"] == 2
    assert config["profile_residuals"]["mean"] == pytest.approx(0.192, abs=0.001)
    assert config["profile_residuals"]["worst"] == pytest.approx(0.366, abs=0.001)
    assert err.count("times are those of profile formula, made 2026-11-22 on NVIDIA H200") == 1
    lines = err.splitlines()
    assert len(set(lines)) == len(lines) == 1 + len(config["profile_notes"])
    assert all(f"gllm: note: {note}" in lines for note in config["profile_notes"])
    assert call(capsys, "replay", *RUN, "--profile", path, "--quiet")[2] == ""


def test_without_a_profile_nothing_is_said(capsys, packaged):
    _, out, err = call(capsys, "replay", *RUN, "--json")
    config = json.loads(out)["config"]
    assert err == ""
    assert config["cost_model"] == "roofline"
    assert not [key for key in config if key.startswith("profile")]
    written(packaged)
    chosen = json.loads(call(capsys, "replay", *RUN, "--json")[1])["config"]
    assert chosen["cost_model"].startswith("profile formula")
    for options in (["--profile", "none"], ["--cost", "host_ns=5"]):
        assert json.loads(call(capsys, "replay", *RUN, "--json", *options)[1])["config"]["cost_model"] == "roofline"


def test_a_comparison_tells_each_note_once(capsys, tmp_path):
    path = written(tmp_path)
    words = ["compare", *RUN[:-4], "--pp", 2, "--policies", "throttle", "sarathi", "--jobs", 1, "--profile", path]
    words.remove("--no-iterations")
    status, _, err = call(capsys, *words, "--quiet")
    assert (status, err) == (0, "")
    status, _, err = call(capsys, *words)
    notes = [line for line in err.splitlines() if "note: " in line]
    assert status == 0
    assert len(set(notes)) == len(notes)
    assert sum("times are those of profile formula" in line for line in notes) == 1
    assert sum("transfers between stages are the roofline's" in line for line in notes) == 1


def test_constants_and_a_profile_do_not_go_together(capsys, tmp_path):
    status, _, err = call(capsys, "replay", *RUN, "--profile", written(tmp_path), "--cost", "host_ns=5")
    assert status == 2
    assert "--cost sets the roofline's constants" in err


def test_a_requests_way_to_its_engine_is_read_where_it_was_measured(tmp_path):
    assert profile(tmp_path).intake_ns == 0
    host = {"dispatch_ns": 1, "return_ns": 2, "intake_ns": 3}
    assert profile(tmp_path, contents(host=host)).intake_ns == 3
