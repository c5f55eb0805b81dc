"""`compare`: policies side by side, each run in its own process."""

import csv
import json
from dataclasses import replace

import pytest

from gllm.console.output import RUN_FILES, TRACE_NAME
from gllm.parallel import Parallel
from gllm.sim import processes
from gllm.sim.cli import main
from gllm.sim.compare import Job, mean_rate, run_all
from gllm.sim.config import SimConfig
from gllm.trace import TraceOptions

FAST = ["--model", "qwen3-0.6b", "--pp", "2", "--limit", "20", "--profile", "none"]
TRACE = TraceOptions(source="chat", limit=10).load()


def job(policy="throttle", **options):
    config = SimConfig(model="qwen3-0.6b", parallel=Parallel(pp=2), policy=policy, **options)
    return Job(config=config, trace=TRACE, rate_per_s=None, scale=1.0, folder=None, iterations=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two policies at two rates."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = ["--policies", "throttle:ut=false,order=edf,sarathi", "--rates", "2,50", "--out", str(out)]
    assert main(["compare", "chat", *FAST, *words, "--iterations"]) == 0
    return out


def test_all_files_are_there(compared):
    assert {path.name for path in compared.iterdir()} == {"compare.html", "compare.json", "compare.csv", "runs"}
    names = {"throttle_ut=false,order=edf@2", "throttle_ut=false,order=edf@50", "sarathi@2", "sarathi@50"}
    assert {path.name for path in (compared / "runs").iterdir()} == names
    for name in names:
        assert {path.name for path in (compared / "runs" / name).iterdir()} == RUN_FILES - {TRACE_NAME}
    page = (compared / "compare.html").read_text()
    assert "throttle:ut=false,order=edf" in page
    assert len(list(csv.DictReader((compared / "compare.csv").open()))) == 4


def test_runs_met_the_traffic_that_was_asked_for(compared):
    runs = json.loads((compared / "compare.json").read_text())["runs"]
    assert [(run["policy"], run["rate_per_s"]) for run in runs] == [
        ("throttle:ut=false,order=edf", 2),
        ("sarathi", 2),
        ("throttle:ut=false,order=edf", 50),
        ("sarathi", 50),
    ]
    assert all(run["num_finished"] == 20 for run in runs)
    slow, fast = runs[0]["config"]["trace"]["rate_scale"], runs[2]["config"]["trace"]["rate_scale"]
    assert fast / slow == pytest.approx(25)
    assert runs[0]["duration_s"] > 2 * runs[2]["duration_s"]


def test_a_run_of_a_comparison_is_the_run_that_replay_makes(compared, capsys):
    single = json.loads((compared / "runs" / "sarathi@50" / "report.json").read_text())
    scale = single["config"]["trace"]["rate_scale"]
    main(["replay", "chat", *FAST, "--policy", "sarathi", "--rate-scale", repr(scale), "--json"])
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["decision_sha256"] == single["decision_sha256"]
    assert replayed["ttft_s"] == single["ttft_s"]


def test_a_second_comparison_replaces_the_first(compared, capsys):
    assert main(["compare", "code", *FAST, "--policies", "throttle", "sarathi", "--out", str(compared)]) == 0
    rate = json.loads((compared / "compare.json").read_text())["runs"][0]["rate_per_s"]
    assert {path.name for path in (compared / "runs").iterdir()} == {f"throttle@{rate:g}", f"sarathi@{rate:g}"}
    assert "iterations.jsonl.gz" not in {path.name for path in (compared / "runs" / f"sarathi@{rate:g}").iterdir()}
    out = capsys.readouterr().out
    assert "throttle" in out
    assert "requests/s" in out


def test_traces_without_times_get_poisson_arrivals_at_each_rate(capsys, tmp_path):
    rows = "".join(f"{10 + n},{n + 1}\n" for n in range(30))
    (tmp_path / "lengths.csv").write_text(f"num_prefill_tokens,num_decode_tokens\n{rows}")
    words = ["compare", str(tmp_path / "lengths.csv"), *FAST, "--policies", "sarathi", "--rates", "1,4", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    runs = json.loads(out)["runs"]
    assert "Poisson arrivals are drawn for each rate" in err
    scales = [run["config"]["trace"]["rate_scale"] for run in runs]
    assert scales[1] / scales[0] == pytest.approx(4)
    assert [run["rate_per_s"] for run in runs] == [1, 4]


def test_all_at_once_has_no_rate(capsys):
    assert main(["compare", "chat", *FAST, "--arrivals", "burst", "--policies", "orca", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"][0]["rate_per_s"] is None
    assert err == ""


def test_one_failing_run_is_named_and_the_others_kept(capsys, monkeypatch, tmp_path):
    def sabotaged(jobs, *rest):  # a model that is gone by the time the run starts
        broken = replace(jobs[1], config=replace(jobs[1].config, model="gone"))
        return run_all([jobs[0], broken], *rest)

    monkeypatch.setattr("gllm.sim.compare.run_all", sabotaged)
    words = ["compare", "chat", *FAST, "--policies", "throttle,sarathi", "--rates", "9", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gllm: error: sarathi@9: model 'gone': ")
    assert "throttle" in out
    assert [run["policy"] for run in json.loads((tmp_path / "o" / "compare.json").read_text())["runs"]] == ["throttle"]
    assert [path.name for path in (tmp_path / "o" / "runs").iterdir()] == ["throttle@9"]


def test_outcomes_keep_their_order_and_their_errors():
    outcomes = run_all([job("orca"), job("throttle", block_size=0), job("sarathi")], 2, ended := [])
    assert list(outcomes) == ["orca@burst", "throttle@burst", "sarathi@burst"]
    assert sorted(ended) == sorted(outcomes)
    assert outcomes["throttle@burst"].startswith("block_size is 0")
    assert outcomes["sarathi@burst"]["num_finished"] == outcomes["orca@burst"]["num_finished"] == 10


def test_a_killed_process_is_an_error_of_its_run_alone(monkeypatch):
    start, started = processes._start, []

    def killed():
        connection, process = start()
        if not started:
            process.kill()
        started.append(process)
        return connection, process

    monkeypatch.setattr(processes, "_start", killed)
    outcomes = run_all([job("orca"), job()], 2)
    assert "was killed (status -9)" in outcomes["orca@burst"]
    assert outcomes["throttle@burst"]["num_finished"] == 10


def test_mean_rate():
    assert mean_rate(TRACE) == pytest.approx(9e9 / TRACE.requests[-1].arrival_ns)
    assert mean_rate(TraceOptions(source="chat", limit=1).load()) is None
