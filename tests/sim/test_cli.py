"""The command line: the main job, every kind of bad input, and nothing left behind."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from gllm.cli import main as gllm
from gllm.console.output import RUN_FILES, TRACE_NAME
from gllm.core import Wait
from gllm.sim.cli import main
from gllm.sim.constants import RooflineConstants
from gllm.sim.options import cost_constants, split_policies

SIM_FILES = RUN_FILES - {TRACE_NAME}

PUBLIC = Path(os.environ.get("GLLM_TRACES", Path(__file__).resolve().parents[3] / "shared" / "traces"))
FAST = ["--model", "qwen3-0.6b", "--pp", "2", "--limit", "20", "--profile", "none"]
HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def call(capsys, *argv, program=main):
    """Status, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        status = program([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def python(*argv, **options):
    return subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_shortest_command_works(capsys):
    status, out, err = call(capsys, "replay", "chat", "--limit", 20)
    assert status == 0
    assert re.fullmatch(r"gllm: note: times are those of profile qwen3-32b_pp2_h200, made [-\d]+ on NVIDIA H200\n", err)
    assert "chat: qwen3-32b on 4 x h200, throttle" in out
    assert "decisions SHA-256 " in out


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLIC.glob("*.gz")) or [None])
def test_every_public_trace_replays(capsys, name):
    if name is None:
        pytest.skip(f"no public traces at {PUBLIC}")
    arrivals = ["--arrivals", "poisson:10"] if "lengths" in name else []
    status, out, _ = call(capsys, "replay", PUBLIC / name, *FAST, *arrivals, "--json")
    summary = json.loads(out)
    assert status == 0
    assert summary["num_requests"] == summary["num_finished"] + summary["num_rejected"] == 20
    assert summary["config"]["trace"]["name"] == name.removesuffix(".gz").rpartition(".")[0]


def test_outputs_are_complete(capsys, tmp_path):
    out = tmp_path / "a" / "b"
    status, text, _ = call(capsys, "replay", "chat", *FAST, "--out", out, "--slo-ttft", 0.1, "--slo-tpot", 0.05)
    assert status == 0
    assert f"report {out / 'report.html'}" in text
    assert {path.name for path in out.iterdir()} == SIM_FILES
    summary = json.loads((out / "report.json").read_text())
    assert summary["goodput"]["slo_ttft_s"] == 0.1
    assert summary["decision_sha256"] in text
    assert len((out / "requests.csv").read_text().splitlines()) == 21
    assert len(json.loads((out / "timeline.json").read_text())["traceEvents"]) > 20
    with gzip.open(out / "iterations.jsonl.gz") as log:
        assert sum(len(json.loads(line)["plans"]) for line in log) == summary["num_iterations"]
    page = (out / "report.html").read_text()
    assert "qwen3-0.6b" in page
    assert "2 x h200" in page


def test_a_second_run_replaces_the_first_wholly(capsys, tmp_path):
    call(capsys, "replay", "chat", *FAST, "--out", tmp_path)
    status, out, _ = call(capsys, "replay", "code", *FAST, "--out", tmp_path, "--no-iterations")
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == SIM_FILES - {"iterations.jsonl.gz"}
    assert json.loads((tmp_path / "report.json").read_text())["config"]["trace"]["name"] == "code"
    assert "not taken" in out


def test_standard_input(capsys, monkeypatch):
    data = io.BytesIO(gzip.compress(f"{HEADER}0,10,5\n1,20,4\n".encode()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(data)))
    status, out, _ = call(capsys, "replay", "-", *FAST, "--json")
    assert status == 0
    assert json.loads(out)["num_finished"] == 2


def test_both_programs_know_the_same_commands(capsys):
    for name in ("traces", "models", "gpus", "policies"):
        ours, theirs = call(capsys, name), call(capsys, name, program=gllm)
        assert ours == theirs
        assert ours[0] == 0
        assert len(ours[1].splitlines()) > 5


def test_options_reach_the_configuration(capsys):
    words = "--model qwen3-30b-a3b --gpu h100 -tp 2 --ep 2 --pp-layers 20,28 --max-in-flight 3 --block-size 32"
    words += " --max-num-seqs 9 --max-model-len 5000 --no-enable-prefix-caching --policy sarathi:token_budget=99"
    words += " --cost host_ns=7,launch_ns=9 --cost gemm_efficiency=0.5 --gpu-memory-utilization 0.8 --limit 3"
    status, out, _ = call(capsys, "replay", "chat", "--json", "--no-iterations", *words.split())
    config = json.loads(out)["config"]
    assert status == 0
    assert config["parallel"] == {"pp": 2, "tp": 2, "ep": 2, "pp_layers": [20, 28]}
    limits = {"block_size": 32, "max_model_len": 5000, "max_num_seqs": 9, "depth": 2, "max_in_flight": 3}
    assert limits.items() <= config["limits"].items()
    assert config["limits"]["prefix_caching"] is False
    assert config["policy"] == "sarathi:token_budget=99"
    constants = config["cost_constants"]
    assert (constants["host_ns"], constants["launch_ns"], constants["gemm_efficiency"]) == (7, 9, 0.5)
    assert config["gpu_memory_utilization"] == 0.8


def test_every_constant_takes_what_it_is_by_default():
    values = {field.name: field.default for field in fields(RooflineConstants)}
    assert cost_constants([f"{name}={value}" for name, value in values.items()]) == RooflineConstants()
    assert cost_constants(["logits_passes=0", "gemm_efficiency=1"]).logits_passes == 0.0
    for text, wanted in (
        ("gemm_efficiency=0", "a share of the peak, above 0 and at most 1"),
        ("gemm_efficiency=1.1", "a share of the peak, above 0 and at most 1"),
        ("logits_passes=-1", "a number, 0 to 10^12"),
        ("host_ns=1.5", "a whole number, 0 to 10^12"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"--cost {text}: must be {wanted}")):
            cost_constants([text])


FILES = {
    "empty.csv": "",
    "header.csv": HEADER,
    "columns.csv": "a,b\n1,2\n",
    "negative.csv": f"{HEADER}0,10,5\n1,-3,4\n",
    "words.csv": f"{HEADER}0,10,5\n1,x,4\n",
    "short.csv": f"{HEADER}0,10,5\n1,20\n",
    "lengths.csv": "num_prefill_tokens,num_decode_tokens\n10,5\n",
    "cut.gz": gzip.compress(HEADER.encode() * 99)[:40],
    "config.json": '{"hidden_size": 8}',
    "file": "x",
    "foreign/thesis.txt": "x",
    "other/runs/a/thesis.txt": "x",
}

BAD = [
    ("replay missing.csv", "missing.csv: no such file"),
    ("replay empty.csv", "empty.csv: is empty"),
    ("replay header.csv", "header.csv: .* no rows"),
    ("replay columns.csv", "columns.csv, row 1: .*name one of"),
    ("replay negative.csv", "negative.csv, row 3: num_prefill_tokens is '-3'"),
    ("replay words.csv", "words.csv, row 3: num_prefill_tokens is 'x'"),
    ("replay short.csv", "short.csv, row 3: has 2 cells"),
    ("replay lengths.csv", "lengths.csv: .*--arrivals poisson:10"),
    ("replay cut.gz", "cut.gz.*gzip"),
    ("replay .", "directory"),
    ("replay chat --format nope", "unknown format 'nope'"),
    ("replay chat --format mooncake", "needs"),
    ("replay chat --window 5", "window '5'"),
    ("replay chat --arrivals nope", "arrivals 'nope'"),
    ("replay chat --rate-scale 0", "--rate-scale: '0' is not a number above zero"),
    ("replay chat --limit 0", "--limit: '0' is not a whole number"),
    ("replay chat --policy nope", "unknown policy 'nope'; known: throttle, sarathi"),
    ("replay chat --policy throttle:nope=1", "unknown option 'nope=1'; known: iterations"),
    ("replay chat --policy throttle:iterations=x", "policy throttle: iterations=x: give a whole number, such as 8"),
    ("replay chat --model nope", "model 'nope': .*known names"),
    ("replay chat --model config.json", "config.json: key .* is missing"),
    ("replay chat --gpu nope", "gpu 'nope' is not known; choose one of"),
    ("replay chat --gpu l4 --pp 1", "qwen3-32b needs .*raise --pp or --tp"),
    ("replay chat --pp 65", "--pp 65 is more than the 64 layers"),
    ("replay chat --pp x", "--pp.*'x' is not a whole number"),
    ("replay chat --pp 4 --pp-layers 64", "--pp-layers .64,. must be 4"),
    ("replay chat --pp-layers 1,x", "--pp-layers: 'x' is not"),
    ("replay chat --tp 3", "--tp 3 does not divide"),
    ("replay chat --ep 2", "--ep 2 does not divide"),
    ("replay chat --max-in-flight 2", "max_in_flight is 2; a pipeline of depth 4"),
    ("replay chat --gpu-memory-utilization 2", "'2' is more than 1"),
    ("replay chat --gpu-memory-utilization 0.01", "raise --pp or --tp"),
    ("replay chat --cost nope=1", "unknown constant; known: memory_efficiency"),
    ("replay chat --cost host_ns=x", "--cost host_ns=x: must be a whole number"),
    ("replay chat --cost gemm_efficiency=2", "must be a share"),
    ("replay chat --nope", "unrecognized arguments: --nope"),
    ("replay", "required: TRACE"),
    ("", "required: COMMAND"),
    ("nope", "invalid choice: 'nope'"),
    ("replay chat --out file", "--out .*file: is a file"),
    ("replay chat --out file/deeper", "--out .*cannot be written"),
    ("replay chat --out /proc/nope", "--out /proc/nope: cannot be written"),
    ("replay chat --out foreign", "holds thesis.txt, which this command did not write"),
    ("replay missing.csv --out new/folder", "no such file"),
    ("compare chat --out foreign --policies throttle", "holds thesis.txt"),
    ("compare chat --out other --policies throttle", "holds runs/a/thesis.txt"),
    ("compare chat", "required: --policies"),
    ("compare chat --policies ,", "--policies: names none"),
    ("compare chat --policies throttle,nope", "unknown policy 'nope'"),
    ("compare chat --policies throttle,throttle:wt=true", "throttle is named twice"),
    ("compare chat --policies throttle --rates x", "--rates: 'x' is not a number above zero"),
    ("compare chat --policies throttle --rates 1,1", "--rates: names a rate twice"),
    ("compare chat --policies throttle --rates 1 --arrivals burst", "--rates: all requests"),
    ("compare missing.csv --policies throttle --rates 1", "no such file"),
    ("compare lengths.csv --policies throttle", "--arrivals poisson:10"),
    ("diff foreign foreign", "no such log; replay with --out"),
    ("diff nope nope", "nope: no such log"),
]


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(("words", "complaint"), BAD, ids=[words or "nothing" for words, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(capsys, bad_files, words, complaint):
    before = contents(bad_files)
    status, out, err = call(capsys, *words.split())
    *notes, last = err.splitlines()
    assert status == 2
    assert out == ""
    assert all(line.startswith("gllm: note: ") for line in notes)
    assert last.startswith("gllm: error: ")
    assert re.search(complaint, last)
    assert contents(bad_files) == before


def test_an_unwritable_folder(capsys, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    status, _, err = call(capsys, "replay", "chat", *FAST, "--out", tmp_path / "new")
    assert (status, "cannot be written" in err) == (2, True)


def test_a_failure_while_writing_leaves_the_older_report(capsys, tmp_path, monkeypatch):
    call(capsys, "replay", "chat", *FAST, "--out", tmp_path)
    before = contents(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "timeline.json")

    monkeypatch.setattr("gllm.report.write.write_timeline", full)
    status, _, err = call(capsys, "replay", "code", *FAST, "--out", tmp_path)
    assert (status, err) == (2, "gllm: error: timeline.json: No space left on device\n")
    assert contents(tmp_path) == before


def test_times_out_of_order_are_sorted_and_counted(capsys, tmp_path):
    (tmp_path / "t.csv").write_text(f"{HEADER}5,10,5\n1,20,4\n2,30,3\n")
    status, _, err = call(capsys, "replay", tmp_path / "t.csv", *FAST)
    assert status == 0
    assert err == "gllm: note: t: rows that came before their predecessor, now sorted by arrival: 1 of 3\n"
    assert call(capsys, "replay", tmp_path / "t.csv", *FAST, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("option", "cause"), [("--num-blocks", "whole KV cache"), ("--max-model-len", "max-model-len")]
)
@pytest.mark.parametrize("policy", ["throttle", "sarathi", "prefill_first", "orca"])
def test_prompts_that_can_never_fit_are_rejected_and_counted(capsys, option, cause, policy):
    limit = 25 if option == "--num-blocks" else 400
    status, out, err = call(capsys, "replay", "chat", *FAST, option, limit, "--policy", policy, "--json")
    summary = json.loads(out)
    assert status == 0
    assert summary["num_rejected"] + summary["num_finished"] == 20
    assert 0 < summary["num_rejected"] < 20
    assert f"{summary['num_rejected']} of 20 requests rejected" in err
    assert cause in err


def test_more_than_the_model_was_trained_for_is_pointed_out(capsys):
    _, _, err = call(capsys, "replay", "chat", *FAST, "--max-model-len", 50_000)
    assert err == "gllm: note: --max-model-len 50,000 exceeds the 40,960 positions of qwen3-0.6b; taken as scaled\n"


def test_a_policy_that_fails_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gllm.policy.sarathi.Sarathi.decide", lambda *_: Wait())
    status, out, err = call(capsys, "replay", "chat", *FAST, "--policy", "sarathi", "--out", tmp_path / "new")
    assert (status, out) == (1, "")
    assert err.startswith("gllm: error: policy sarathi: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_our_own_bugs_are_not_hidden(monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr("gllm.sim.replay.simulate", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["replay", "chat", *FAST])


def test_split_policies():
    assert split_policies(["throttle,sarathi,orca"]) == ["throttle", "sarathi", "orca"]
    assert split_policies(["throttle:ut=false,order=edf,sarathi"]) == ["throttle:ut=false,order=edf", "sarathi"]
    assert split_policies(["a:x=1,y=2;b c:z=3", "d"]) == ["a:x=1,y=2", "b", "c:z=3", "d"]
    assert split_policies(["a", "x=1"]) == ["a", "x=1"]
    assert split_policies([",", ""]) == []


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom gllm.sim.cli import main\ntry: main(['replay', '--help'])\n"
        "except SystemExit: pass\nheavy = {'numpy', 'simpy', 'rich', 'pandas', 'torch', 'matplotlib', 'gllm.core'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    process = python("-c", code)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "--policy" in out


def test_the_command_reads_its_trace_within_a_second():
    start = time.perf_counter()
    process = python("-m", "gllm.sim", "replay", "missing.csv")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "missing.csv" in err
    assert time.perf_counter() - start < 3, "a second on an idle machine; three on a busy one"


def test_a_closed_pipe_is_quiet():
    process = python("-m", "gllm.sim", "models")
    process.stdout.close()
    process.wait()
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("command", [["replay"], ["compare", "--policies", "throttle,sarathi"]])
def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, command):
    words = [
        "chat",
        "--model",
        "qwen3-0.6b",
        "--profile",
        "none",
        "--repeat",
        40,
        "--rate-scale",
        9,
        "--out",
        tmp_path / "new",
    ]
    process = python("-m", "gllm.sim", command[0], *words, *command[1:], start_new_session=True)
    while not (tmp_path / "new").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "gllm: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_replay_leaves_nothing(tmp_path):
    words = ["chat", "--model", "qwen3-0.6b", "--repeat", 40, "--rate-scale", 9, "--out", tmp_path / "new"]
    process = python("-m", "gllm.sim", "replay", *words)
    while not (tmp_path / "new").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_is_swept(capsys, tmp_path):
    ended = python("-c", "")
    ended.communicate()
    left = tmp_path / f".gllm.{ended.pid}"
    left.mkdir()
    (left / "report.json").write_text("{")
    assert call(capsys, "replay", "chat", *FAST, "--out", tmp_path)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == SIM_FILES
