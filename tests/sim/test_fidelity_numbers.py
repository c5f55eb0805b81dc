"""`fidelity`: recorded runs whose cost model is known, so that every error is."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from report.made import record as made_record
from report.pages import check_page
from sim.costs import FixedCost
from sim.profiles import CHUNKED_GAP, DECODE_GAP, contents
from sim.recorded_runs import draw_script, record, small_limits
from sim.twin_runs import BASE, record_run, small_trace, write_columns

from gllm.console.output import FIDELITY_FILES
from gllm.gpu_clock import GpuClock, PowerLimit, StageClock
from gllm.parallel import Parallel
from gllm.report.decision_log import LOG_NAME
from gllm.report.metrics import summarize
from gllm.report.record_file import write_record
from gllm.sim.cli import main
from gllm.sim.cost import Load, batch_work
from gllm.sim.fidelity.compare import Comparison, compare
from gllm.sim.fidelity.free import run_free
from gllm.sim.fidelity.metrics import compare_metrics
from gllm.sim.fidelity.runs import RecordedRun, read_runs, sim_config
from gllm.sim.fidelity.stages import Predictions, stage_errors, wait_errors
from gllm.sim.recording import read_recording


def fidelity(capsys, *words, profile="none"):
    """Status, what was printed as JSON, and standard error."""
    capsys.readouterr()
    status = main(["fidelity", *map(str, words), "--profile", str(profile), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def compared(folder, log, cost=None, bar=2.0):
    """The comparison of a run, under its own cost model or another one."""
    runs = read_runs([str(folder)])
    setup = sim_config(runs[0], gpu=None, profile="none", constants=BASE.constants).resolve()
    return compare(runs, setup if cost is None else replace(setup, cost=cost(setup.cost)), log, bar=bar)


class Slower:
    """A cost model `times` as slow in everything."""

    clock = None

    def __init__(self, cost, times=2):
        self._cost, self._times = cost, times
        self.num_stages, self.host_ns, self.return_ns = cost.num_stages, times * cost.host_ns, times * cost.return_ns
        self.intake_ns = times * cost.intake_ns

    def stage_ns(self, work):
        return [self._times * time for time in self._cost.stage_ns(work)]

    def load(self, _):
        return None

    def transfer_ns(self, work):
        return self._times * self._cost.transfer_ns(work)

    def gap_ns(self, work):
        return self._times * self._cost.gap_ns(work)

    def components(self, work):
        return {name: [self._times * time for time in row] for name, row in self._cost.components(work).items()}


@pytest.fixture(scope="module")
def spread_out(tmp_path_factory):
    """A run whose requests arrive over time."""
    folder = tmp_path_factory.mktemp("twin") / "spread"
    return folder, record_run(folder, small_trace(1))


@pytest.fixture(scope="module")
def burst(tmp_path_factory):
    """A run whose requests are all there from the start."""
    folder = tmp_path_factory.mktemp("twin") / "burst"
    return folder, record_run(folder, small_trace(2, gap_ns=0))


@pytest.fixture
def copy(spread_out, tmp_path):
    """A copy of a run, to be spoilt."""
    for path in spread_out[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": Parallel()},
        {"parallel": Parallel(pp=4), "policy": "sarathi:token_budget=64", "max_in_flight": 4},
        {"num_blocks": 130, "policy": "prefill_first"},
        {"prefix_caching": False, "policy": "throttle:order=lpm"},
    ],
    ids=["throttle", "one stage", "four stages", "preemptions", "no prefix cache"],
)
@pytest.mark.parametrize("gap_ns", [0, 4_000_000], ids=["burst", "spread out"])
def test_under_the_same_cost_model_nothing_is_off(capsys, tmp_path, changes, gap_ns):
    run = record_run(tmp_path / "run", small_trace(3, gap_ns=gap_ns), **changes)
    status, found, err = fidelity(capsys, tmp_path / "run", "--check", "--bar", "1e-9")
    assert (status, err) == (0, "")
    decisions = found["decisions"]
    assert decisions["queued"]["is_equal"] is (None if gap_ns else True)
    assert decisions["injected"][0]["is_equal"]
    assert decisions["free"]["first_difference"] is None
    assert decisions["free"]["num_same_chunks"] == 40
    assert {metric["error"] for metric in found["metrics"]} == {0.0}
    assert {row["error"] for row in found["stages"]} == {row["absolute_error"] for row in found["stages"]} == {0.0}
    assert all(row["measured_ns"] == row["predicted_ns"] for row in found["waits"])
    preemptions = next(metric for metric in found["metrics"] if metric["label"] == "preemptions")
    assert preemptions["measured"] == run.requests["num_preemptions"].sum()
    assert (preemptions["measured"] > 0) == ("num_blocks" in changes)


def test_when_all_takes_twice_as_long_all_is_twice_as_long(burst, tmp_path):
    """Nothing but the cost model's times enters a run whose requests are all there from the start."""
    found = compared(burst[0], tmp_path / "log", Slower)
    assert found.queued.is_equal
    assert found.free.first_difference is None
    errors = {metric.label: metric.error for metric in found.metrics}
    times = [label for label, error in errors.items() if re.match("TTFT|TPOT|ITL|E2E|duration|stage . busy", label)]
    assert len(times) == 19
    assert [errors[label] for label in times] == pytest.approx([100.0] * len(times), abs=1e-6)
    assert [errors["requests/s"], errors["output tokens/s"]] == pytest.approx([-50.0, -50.0])
    assert [errors["iterations"], errors["prefix-hit tokens"], errors["tokens/batch, std"]] == [0.0] * 3
    assert errors["stage 1 bubbles"] == pytest.approx(0.0, abs=1e-9)
    assert not found.passes
    assert {row.error for row in found.stages} == {row.absolute_error for row in found.stages} == {100.0}
    seen = {row.name: row for row in found.waits if row.num_samples}
    assert {"transfer", "dispatch", "return"} <= set(seen)
    assert all(row.predicted_ns == 2 * row.measured_ns for row in seen.values())


def test_stage_errors_add_up_by_kind(spread_out, tmp_path):
    """Of a cost model that takes the same for any micro-batch."""
    folder, run = spread_out
    found = compared(folder, tmp_path / "log", lambda _: FixedCost(num_stages=2, batch_ns=900_000, host_ns=7, hop_ns=5))
    measured = run.stage_end_ns - run.stage_start_ns
    prefill, decode = run.batches["num_prefill_tokens"], run.batches["num_decode_tokens"]
    masks = {"decode only": prefill == 0, "prefill only": decode == 0, "mixed": (prefill > 0) & (decode > 0)}
    masks["mixed, to 128"] = masks["mixed"] & (prefill + decode <= 128)
    masks["mixed, to 512"] = masks["mixed"] & (prefill + decode > 128)
    masks["all"] = prefill >= 0
    assert [(row.stage, row.kind) for row in found.stages] == [(stage, kind) for stage in (0, 1) for kind in masks]
    for row in found.stages:
        times = measured[masks[row.kind], row.stage]
        assert row.num_batches == times.size
        assert row.measured_s == pytest.approx(times.sum() / 1e9)
        assert row.predicted_s == pytest.approx(times.size * 900_000 / 1e9)
        assert row.share == pytest.approx(times.sum() / measured[:, row.stage].sum())
        assert row.error == pytest.approx(100 * (900_000 * times.size / times.sum() - 1))
        assert row.absolute_error == pytest.approx(100 * np.abs(900_000 - times).sum() / times.sum())
        assert row.components_s == {"gemm": pytest.approx(row.predicted_s)}
    waits = {row.name: row for row in found.waits}
    constants = BASE.constants
    assert (waits["dispatch"].measured_ns, waits["dispatch"].predicted_ns) == (constants.host_ns, 7)
    assert (waits["return"].measured_ns, waits["return"].difference_ns) == (constants.return_ns, -constants.return_ns)
    assert (waits["transfer"].measured_ns > 40_000, waits["transfer"].predicted_ns) == (True, 5)


def test_the_gap_before_a_step_is_no_part_of_its_stamps(spread_out, tmp_path):
    cost = FixedCost(num_stages=2, batch_ns=1_000_000, hop_ns=9, host_ns=70_000, return_ns=30_000, between_ns=50_000)
    cost = replace(cost, intake_ns=20_000)
    (run,) = read_runs([str(spread_out[0])])
    made = replace(run_free(run, cost, tmp_path / LOG_NAME), mode="measured")
    assert np.unique(made.stage_end_ns - made.stage_start_ns).tolist() == [1_000_000]
    (tmp_path / "trace.jsonl.gz").write_bytes((spread_out[0] / "trace.jsonl.gz").read_bytes())
    write_columns(tmp_path, made)
    found = compared(tmp_path, tmp_path / "log", lambda _: cost)
    assert {metric.error for metric in found.metrics} == {0.0}
    assert {row.error for row in found.stages} == {0.0}
    assert set(found.stages[0].components_s) == {"gemm"}
    waits = {row.name: (row.measured_ns, row.predicted_ns) for row in found.waits if row.num_samples}
    assert waits == {
        "intake": (20_000, 20_000),
        "transfer": (9, 9),
        "dispatch": (70_000, 70_000),
        "return": (30_000, 30_000),
        "gap before decodes": (50_000, 50_000),
        "gap before others": (50_000, 50_000),
    }


def test_a_machine_that_is_as_its_profile_says(capsys, spread_out, tmp_path):
    """What is beyond the profile's tables is told; nothing is off, unless another profile is taken."""
    (run,) = read_runs([str(spread_out[0])])
    path, other = tmp_path / "machine.json", tmp_path / "other.json"
    path.write_text(json.dumps(contents()))
    other.write_text(json.dumps(contents(gap={"decode_ns": 100_000, "chunked_ns": 900})))
    cost = sim_config(run, gpu=None, profile=str(path), constants=BASE.constants).resolve().cost
    folder = tmp_path / "run"
    folder.mkdir()
    made = replace(run_free(run, cost, folder / LOG_NAME), mode="measured")
    (folder / "trace.jsonl.gz").write_bytes((spread_out[0] / "trace.jsonl.gz").read_bytes())
    write_columns(folder, made)
    status, found, err = fidelity(capsys, folder, "--check", "--bar", "1e-9", profile=path)
    assert status == 0
    assert {metric["error"] for metric in found["metrics"]} == {0.0}
    assert {row["error"] for row in found["stages"]} == {0.0}
    assert "launch" not in found["stages"][0]["components_s"]
    assert found["cost"]["cost_model"].startswith("profile machine, ")
    assert found["cost"]["profile_notes"]
    assert err == "".join(f"gllm: note: {note}\n" for note in found["cost"]["profile_notes"])
    status, found, _ = fidelity(capsys, folder, "--check", "--quiet", profile=other)
    gaps = {row["name"]: (row["measured_ns"], row["predicted_ns"]) for row in found["waits"]}
    assert status == 1
    assert {row["error"] for row in found["stages"]} == {0.0}
    assert gaps["gap before decodes"] == (DECODE_GAP, 100_000)
    assert gaps["gap before others"] == (CHUNKED_GAP, CHUNKED_GAP)


def test_a_device_without_a_data_sheet_needs_a_profile(spread_out, tmp_path):
    (run,) = read_runs([str(spread_out[0])])
    run = replace(run, record=replace(run.record, config={**run.record.config, "gpu": "cpu"}))
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(contents(gpu=None, device="cpu")))
    cost = sim_config(run, gpu=None, profile=str(path), constants=BASE.constants).resolve().cost
    assert "cpu has no data sheet" in cost.notes[0]
    with pytest.raises(ValueError, match="its gpu 'cpu' is none that is known"):
        sim_config(run, gpu=None, profile="auto", constants=BASE.constants)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("roofline", "roofline, h200"),
        ("profile a, 2026-11-23, NVIDIA H200", "profile a, 2026-11-23, NVIDIA H200"),
        ("profile a, 2026-11-23, cpu", "profile a, 2026-11-23, cpu"),
        ("profile a, 2026-11-23, NVIDIA H100", "profile a, 2026-11-23, NVIDIA H100, h200"),
    ],
)
def test_a_gpu_is_named_unless_the_profile_names_it(model, said):
    found = SimpleNamespace(cost={"cost_model": model, "gpu": "h200"})
    assert Comparison.simulated_with.fget(found) == said


def test_decisions_that_follow_other_times_are_counted(capsys, spread_out):
    folder, run = spread_out
    status, found, _ = fidelity(capsys, folder, "--cost", "host_ns=3000000")
    free = found["decisions"]["free"]
    assert status == 0
    assert not found["passes"]
    assert found["decisions"]["queued"]["why_not"] == "requests arrive over time"
    assert found["decisions"]["injected"][0]["is_equal"]
    assert free["num_recorded"] == run.batches.size
    assert 0 < free["first_difference"] < run.batches.size
    assert 0 < free["num_same_chunks"] < 40
    assert {row["error"] for row in found["stages"]} == {0.0}
    (dispatch,) = [row for row in found["waits"] if row["name"] == "dispatch"]
    assert (dispatch["measured_ns"], dispatch["predicted_ns"]) == (BASE.constants.host_ns, 3_000_000)
    assert found["cost"]["cost_constants"]["host_ns"] == 3_000_000


SUMMARY = {
    "ttft_s": {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0},
    "tpot_s": {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0},
    "itl_s": {"mean": None, "p50": None, "p90": None, "p99": None},
    "e2e_s": {"mean": 9.0, "p50": 9.0, "p90": 9.0, "p99": 9.0},
    "queue_s": {"mean": 0.1, "p50": 0.1, "p90": 0.1, "p99": 0.1},
    "requests_per_s": 5.0,
    "output_tokens_per_s": 50.0,
    "duration_s": 8.0,
    "num_iterations": 100,
    "num_preemptions": 0,
    "num_cached_tokens": 0,
    "num_peak_blocks": 7,
    "tokens_per_batch": {"mean": 4.0, "std": 1.0},
    "stages": [{"busy_s": 3.0, "bubble_fraction": 0.5}],
}


def spreads(value):
    return dict.fromkeys(("mean", "p50", "p90", "p99"), value)


def judged(simulated, *recorded, bar=2.0):
    rows = compare_metrics([{**SUMMARY, **changes} for changes in recorded or ({},)], {**SUMMARY, **simulated}, bar)
    return {row.label: row for row in rows}


@pytest.mark.parametrize(
    ("simulated", "label", "error", "passes"),
    [
        ({"tpot_s": spreads(1.0199)}, "TPOT mean", 1.99, True),
        ({"tpot_s": spreads(0.97)}, "TPOT mean", -3.0, False),
        ({"tpot_s": spreads(0.97)}, "TPOT p90", -3.0, False),
        ({"tpot_s": spreads(0.97)}, "TPOT p99", -3.0, True),
        ({"ttft_s": spreads(2.06)}, "TTFT mean", 3.0, True),
        ({"ttft_s": spreads(2.1)}, "TTFT mean", 5.0, False),
        ({"ttft_s": spreads(None)}, "TTFT mean", None, False),
        ({"itl_s": spreads(None)}, "ITL mean", None, None),
        ({"itl_s": spreads(1.0)}, "ITL mean", None, False),
        ({"queue_s": spreads(0.3)}, "queue mean", 200.0, None),
        ({"num_preemptions": 0}, "preemptions", 0.0, True),
        ({"num_preemptions": 1}, "preemptions", None, False),
        ({"output_tokens_per_s": 51.5}, "output tokens/s", 3.0, False),
        ({"stages": [{"busy_s": 3.0, "bubble_fraction": 0.515}]}, "stage 0 bubbles", 1.5, True),
        ({"stages": [{"busy_s": 3.0, "bubble_fraction": 0.47}]}, "stage 0 bubbles", -3.0, False),
    ],
)
def test_how_a_metric_is_judged(simulated, label, error, passes):
    row = judged(simulated)[label]
    assert row.error == (None if error is None else pytest.approx(error))
    assert row.passes is passes
    assert row.spread is None
    assert row.bar == (None if passes is None else 4.0 if "TTFT" in label or "p99" in label else 2.0)


def test_noise_is_the_spread_of_the_recorded_runs():
    row = judged({"tpot_s": spreads(1.1)}, {}, {"tpot_s": spreads(1.04)}, {"tpot_s": spreads(1.02)})["TPOT mean"]
    assert (row.measured, row.spread) == (pytest.approx(1.02), pytest.approx(100 * 0.04 / 1.02))
    assert row.error == pytest.approx(100 * 0.08 / 1.02)
    assert row.passes
    row = judged({"tpot_s": spreads(1.11)}, {}, {"tpot_s": spreads(1.04)}, {"tpot_s": spreads(1.02)})["TPOT mean"]
    assert not row.passes
    bubbles = {"stages": [{"busy_s": 3.0, "bubble_fraction": 0.53}]}
    assert judged({}, {}, bubbles)["stage 0 bubbles"].spread == pytest.approx(3.0)
    assert judged({"tpot_s": spreads(1.04)}, bar=5)["TPOT mean"].passes


def test_several_runs(capsys, spread_out, tmp_path):
    """The second run was slower and had another cache: the mean of both is the truth, their distance the noise."""
    folder, one = spread_out
    slower = replace(BASE.constants, gemm_efficiency=0.2, memory_efficiency=0.2)
    other = record_run(tmp_path / "other", small_trace(1), constants=slower, num_blocks=700)
    status, found, err = fidelity(capsys, folder, tmp_path / "other")
    assert status == 0
    assert re.fullmatch("gllm: note: the runs had caches of 600, 700 blocks; the simulation has the first one's\n", err)
    assert found["runs"] == [str(folder), str(tmp_path / "other")]
    assert [each["is_equal"] for each in found["decisions"]["injected"]] == [True, True]
    tpot = next(metric for metric in found["metrics"] if metric["label"] == "TPOT mean")
    means = [summarize(run, slo_ttft_s=None, slo_tpot_s=None)["tpot_s"]["mean"] for run in (one, other)]
    assert tpot["measured"] == pytest.approx(sum(means) / 2)
    assert tpot["simulated"] == pytest.approx(means[0])
    assert tpot["spread"] == pytest.approx(100 * (means[1] - means[0]) / tpot["measured"])
    assert tpot["error"] == pytest.approx(-tpot["spread"] / 2)
    assert tpot["error"] < -2
    assert tpot["passes"]


def test_the_exit_status_is_the_verdict_only_if_asked_for(capsys, spread_out):
    words = [spread_out[0], "--cost", "memory_efficiency=0.3"]
    assert fidelity(capsys, *words)[0] == 0
    assert fidelity(capsys, *words, "--check")[0] == 1
    assert fidelity(capsys, *words, "--check", "--bar", "1000")[0] == 0


def test_the_folder(capsys, spread_out, tmp_path):
    out = tmp_path / "out"
    status, found, _ = fidelity(capsys, spread_out[0], "--cost", "gemm_efficiency=0.4", "--out", out)
    assert status == 0
    assert {path.name for path in out.iterdir()} == FIDELITY_FILES
    assert json.loads((out / "fidelity.json").read_text()) == found
    page = (out / "fidelity.html").read_text(encoding="utf-8")
    assert check_page(page) == 4
    for text in ("qwen3-0.6b, measured and simulated", "roofline, h200", "requests arrive over time", "0, decode only"):
        assert text in page
    trace = json.loads((out / "timeline.json").read_text())
    lanes = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert list(lanes.values())[:2] == ["stage 0, measured", "stage 0, simulated"]
    assert trace["otherData"]["num_batches_measured"] == spread_out[1].batches.size
    assert main(["diff", str(spread_out[0]), str(out)]) == (found["decisions"]["free"]["first_difference"] is not None)
    assert main(["fidelity", str(spread_out[0]), "--decisions", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {LOG_NAME}, "of an older comparison nothing stays"


def test_what_the_terminal_shows(capsys, burst, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["fidelity", str(burst[0]), "--cost", "memory_efficiency=0.5"]) == 0
    out, _ = capsys.readouterr()
    digest = json.loads((burst[0] / "report.json").read_text())["decision_sha256"]
    assert f"decisions without times: equal, SHA-256 {digest}\n" in out
    assert re.search(r"decisions on recorded times: equal, \d+ of them\n", out)
    assert re.search(r"decisions running free: equal, \d+ of them\n", out)
    assert re.search(r"outside the bar: .*TPOT mean", out)
    assert re.search(r"TPOT mean +[\d.]+ ms +[\d.]+ ms +\+[\d.]+ % +NO", out)
    for words in ("0, decode only", "1, all", "transfer", "gap before decodes", "KV blocks, peak"):
        assert words in out


@pytest.mark.parametrize("aborts", [0.0, 0.4])
def test_clients_that_leave_do_so_in_the_simulation_too(tmp_path, aborts):
    limits = small_limits(2, 1)
    record(tmp_path, "throttle", limits, draw_script(4, limits, 60, gap=100_000, aborts=aborts), seed=1)
    recording = read_recording(tmp_path)
    cost = FixedCost(num_stages=2, batch_ns=300)
    run = RecordedRun(folder=tmp_path, recording=recording, record=RecordedConfig({}), summary={})
    found = summarize(run_free(run, cost, tmp_path / "log"), slo_ttft_s=None, slo_tpot_s=None)
    assert found["num_requests"] == 60 == found["num_finished"] + found["num_aborted"] + found["num_rejected"]
    assert (found["num_aborted"] > 0) == (aborts > 0)


class RecordedConfig(NamedTuple):
    """All that a free simulation needs of a record."""

    config: dict


def reported(folder, **changes):
    path = folder / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "config": {**report["config"], **changes}}))


def other_record(folder):
    """The columns of another run."""
    run = record_run(folder / "other", small_trace(1, num_requests=7))
    write_record(folder, run)


def failed(folder):
    """A request that failed, as far as the columns tell."""
    (run,) = read_runs([str(folder)])
    requests = run.record.requests.copy()
    requests["status"][3] = 4
    write_record(folder, replace(run.record, requests=requests))


@pytest.mark.parametrize(
    ("spoil", "words", "complaint"),
    [
        (
            lambda run: (run / "record.npz").unlink(),
            [],
            "record.npz: no such file; the run was written by an older gLLM",
        ),
        (lambda run: (run / "trace.jsonl.gz").unlink(), [], "trace.jsonl.gz: no such file"),
        (lambda run: (run / LOG_NAME).unlink(), [], "no such log"),
        (lambda run: reported(run, model_shape=None), [], "report.json: model_shape is missing"),
        (lambda run: reported(run, parallel=[]), [], "report.json: parallel is missing"),
        (lambda run: reported(run, model_shape={"name": "x"}), [], "report.json: model_shape is not whole"),
        (
            lambda run: reported(run, gpu="cpu"),
            [],
            "report.json: its gpu 'cpu' is none that is known; name one with --gpu, or a profile with --profile",
        ),
        (lambda run: reported(run, gpu="cpu"), ["--gpu", "abacus"], "gpu 'abacus' is not known"),
        (other_record, [], "record.npz has 7 requests, trace.jsonl.gz 40"),
        (failed, [], "of its requests 1 failed; only --decisions"),
        (
            lambda run: (run / "report.json").write_text(
                (run / "report.json").read_text().replace('sha256": "', 'sha256": "f')
            ),
            [],
            "the report's decisions are not those of its log",
        ),
        (lambda _: None, ["nowhere"], "nowhere: no such folder"),
        (lambda _: None, ["--bar", "0"], "--bar: '0' is not a number above zero"),
        (lambda _: None, ["--profile", "nope"], "nope"),
    ],
)
def test_mistakes_are_one_line(capsys, copy, spoil, words, complaint):
    spoil(copy)
    try:
        status = main(["fidelity", str(copy), *words])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gllm: error: .*{complaint}.*\n", err)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 9}, "trace"),
        ({"policy": "orca"}, "policy"),
        ({"max_num_seqs": 9}, "limits"),
        ({"model": "qwen3-8b"}, "model_shape"),
        ({"gpu": "h100"}, "gpus"),
    ],
)
def test_runs_that_are_no_repetitions_are_refused(capsys, spread_out, tmp_path, changes, differing):
    options = dict(changes)
    record_run(tmp_path / "other", small_trace(options.pop("seed", 1)), **options)
    status, found, err = fidelity(capsys, spread_out[0], tmp_path / "other")
    assert (status, found) == (2, None)
    assert re.fullmatch(rf"gllm: error: .*other: its {differing} is not that of .*\n", err)


def test_the_device_names_the_gpu(spread_out):
    (run,) = read_runs([str(spread_out[0])])
    for device, name in (("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA L40S", "l40s")):
        found = replace(run, record=replace(run.record, config={**run.record.config, "gpu": device}))
        assert sim_config(found, gpu=None, profile="none", constants=BASE.constants).gpu == name


def test_host_times_are_taken_where_they_show_by_themselves():
    """Milliseconds: the second micro-batch is dispatched to an empty pipeline, but the third is before it is back."""
    made = made_record(
        batches=[(0.001 * at, 9 * (at in {0, 30}), at in {10, 11}, 5, 0, 1, -1, 0) for at in (0, 10, 11, 30)],
        stages=[[(0.001, 0.005)], [(0.012, 0.015)], [(0.0155, 0.020)], [(0.032, 0.035)]],
        done=[0.006, 0.018, 0.025, 0.037],
        num_stages=1,
    )
    predictions = Predictions(FixedCost(host_ns=40, return_ns=30))
    for prefill in (9, 0, 0, 9):
        work = batch_work(chunks=[(0, prefill)] if prefill else [], contexts=[] if prefill else [7])
        predictions.watch(SimpleNamespace(depends_on=-1, **asdict(work)))
    found = {row.name: (row.num_samples, row.measured_ns, row.predicted_ns) for row in wait_errors(predictions, made)}
    assert found == {
        "intake": (0, None, None),
        "dispatch": (3, 2_000_000, 40),
        "return": (2, 1_500_000, 30),
        "gap before decodes": (1, 500_000, 0),
        "gap before others": (0, None, None),
    }


class Hot(FixedCost):
    """All that it computes draws as much as can be."""

    clock = GpuClock(limits=(PowerLimit(tau_ns=1_000_000, slowdown=0.5, knee=0.0),), attention=0.0)

    def load(self, work):
        return Load([*self.stage_ns(work)], [*map(float, self.stage_ns(work))], 1.0)


def test_steps_are_predicted_for_when_they_were_computed():
    """Four in a row, the last two much later; a gap is a rest, too."""
    starts = [0.0, 0.0011, 1.0, 1.0011]
    made = made_record(
        batches=[(0.001 * at, 9, 0, 5, 0, 1, -1, 0) for at in range(4)],
        stages=[[(start, start + 0.001)] for start in starts],
        done=[at + 2 for at in starts],
        num_stages=1,
    )
    predictions = Predictions(Hot(batch_ns=1_000_000, between_ns=100_000))
    for _ in range(4):
        predictions.watch(SimpleNamespace(depends_on=-1, **asdict(batch_work(chunks=[(0, 9)]))))
    assert predictions.stage_ns.tolist() == [[1_000_000]] * 4, "without the clock"
    stretch_ns = predictions.stretch_ns(made.stage_start_ns, made.stage_end_ns)[:, 0].tolist()
    clock = StageClock(Hot.clock)
    by_hand = [clock.step(idle_ns, 1_000_000, 1e6, 1.0) - 1_000_000 for idle_ns in (0, 100_000, 997_900_000, 100_000)]
    assert stretch_ns == pytest.approx(by_hand, abs=2), "stamps are in seconds here"
    assert 0 < by_hand[0] < by_hand[1] < 500_000
    assert by_hand[2:] == pytest.approx(by_hand[:2], abs=2)
    *_, row = stage_errors(predictions, made)
    assert row.predicted_s == pytest.approx((4_000_000 + sum(stretch_ns)) / 1e9)
    assert row.components_s == {"gemm": pytest.approx(row.predicted_s)}


def test_mixed_batches_are_looked_at_by_size():
    tokens = (100, 128, 129, 3000)  # a decode among them
    made = made_record(
        batches=[(0.001 * at, num - 1, 1, 5, 0, 1, -1, 0) for at, num in enumerate(tokens)],
        stages=[[(at, at + 0.001 * (at + 1))] for at in range(4)],
        done=[at + 0.5 for at in range(4)],
        num_stages=1,
    )
    predictions = Predictions(FixedCost(batch_ns=1_000_000))
    for num in tokens:
        predictions.watch(SimpleNamespace(depends_on=-1, **asdict(batch_work(chunks=[(0, num - 1)], contexts=[7]))))
    found = {row.kind: (row.num_batches, row.measured_s) for row in stage_errors(predictions, made)}
    assert found == {
        "mixed": (4, pytest.approx(0.010)),
        "mixed, to 128": (2, pytest.approx(0.003)),
        "mixed, to 512": (1, pytest.approx(0.003)),
        "mixed, longer": (1, pytest.approx(0.004)),
        "all": (4, pytest.approx(0.010)),
    }
