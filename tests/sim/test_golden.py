"""Decisions that must not change unless they are meant to, byte for byte on any machine.

Each file of tests/golden holds the first decision lines of one policy on the first requests of a
shipped sample, with a cache so small that sequences are preempted, and then a line with the number
and the SHA-256 of all of them. Where a change is meant to alter decisions, write the files anew and
look at what `git diff` says:

    python tests/sim/test_golden.py
"""

from pathlib import Path

import pytest

from gllm.parallel import Parallel
from gllm.report.decision_log import canonical, read_decisions
from gllm.sim.config import SimConfig
from gllm.sim.run import simulate
from gllm.trace import TraceOptions

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NUM_LINES = 300
SYNC = {"max_in_flight": 2}  # as many as stages
ASYNC = {"max_in_flight": 4}  # plans run ahead of the tokens they feed in

CASES = {
    "throttle": ("throttle:max_prefill=512", SYNC),
    "throttle-async": ("throttle:max_prefill=512", ASYNC),
    "throttle-wt": ("throttle:max_prefill=512,ut=false", SYNC),
    "throttle-ut": ("throttle:max_prefill=512,wt=false", SYNC),
    "throttle-decode-only": ("throttle:max_prefill=512,wt=false,ut=false", SYNC),
    "sarathi": ("sarathi:token_budget=512", SYNC),
    "prefill_first": ("prefill_first", SYNC),
    "orca": ("orca", SYNC),
    "sarathi-lpm": ("sarathi:token_budget=512,order=lpm", SYNC),
}


def config(policy, options):
    return SimConfig(
        model="qwen3-0.6b",
        gpu="l4",
        parallel=Parallel(pp=2, pp_layers=(14, 14)),  # decisions, not how layers are dealt
        policy=policy,
        max_num_seqs=12,
        num_blocks=90,
        max_model_len=2048,
        trace=TraceOptions(source="chat", limit=30, rate_scale=20.0, max_total_tokens=600),
        **options,
    )


def run(name, folder):
    """What a case's file must hold, and its record."""
    case = config(*CASES[name])
    path = folder / name
    record = simulate(case, case.trace.load(), log_path=path)
    lines = [canonical(decision) for decision in read_decisions(path)]
    last = f'{{"decisions":{len(lines)},"sha256":"{record.decision_sha256}"}}'
    return "".join(f"{line}\n" for line in [*lines[:NUM_LINES], last]), record


def test_the_table_covers_every_policy():
    from gllm.policy import POLICIES

    assert {policy.partition(":")[0] for policy, _ in CASES.values()} == set(POLICIES)
    assert {path.stem for path in GOLDEN.glob("*.jsonl")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_decisions_are_as_they_were(name, tmp_path):
    lines, record = run(name, tmp_path)
    assert lines == (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8")
    assert (record.requests["num_cached_tokens"] > 0).any(), "no prefix hit: the case tests too little"
    if not name.startswith("orca"):  # which reserves and so never preempts
        assert (record.requests["num_preemptions"] > 0).any(), "no preemption: the case tests too little"
    if name == "throttle-async":
        assert record.num_discarded.sum() > 0, "no late stop: the case tests too little"


def write_all():
    """Write the files anew."""
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.jsonl"):
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            (GOLDEN / f"{name}.jsonl").write_text(run(name, Path(folder))[0], encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_all()
