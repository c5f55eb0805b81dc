"""Prediction intervals: how errors of checks become those of a run, and where reports show them."""

import json
import pickle
import re
from dataclasses import replace
from html import escape
from itertools import count, repeat
from random import Random

import pytest
from report.pages import check_page
from sim.played import arrival, play
from sim.profiles import CLOCK, SHAPE, contents, profile, step, written
from sim.twin_runs import BASE, record_run, small_trace

from gllm.parallel import Parallel
from gllm.report.metrics import summarize
from gllm.report.rows import bounds, intervals_note, show_bounds
from gllm.sim import calibration
from gllm.sim.calibration import MACHINES, MIN_CHECKS, Calibration, Errors, ReplicaCost, _deviations, calibrate
from gllm.sim.cli import main
from gllm.sim.fidelity.compare import compare
from gllm.sim.fidelity.runs import read_runs, sim_config
from gllm.sim.gpus import get_gpu
from gllm.sim.intervals import interval, predict_intervals
from gllm.sim.profiled import Profiled

REPLAY = ["replay", "chat", "--limit", "12", "--model", "qwen3-0.6b", "--pp", "1", "--jobs", "1"]


class Machine:
    """The hardware: a cost model that is off by `bias`, and by a draw for like steps, or for every step, besides."""

    def __init__(self, cost, *, seed, noise, bias=0.0, by_step=False):
        self._cost, self._seed, self._noise, self._bias = cost, seed, noise, bias
        self._numbers = count() if by_step else repeat(0)
        self.num_stages, self.host_ns, self.return_ns = cost.num_stages, cost.host_ns, cost.return_ns
        self.transfer_ns, self.gap_ns = cost.transfer_ns, cost.gap_ns
        self.clock, self.load, self.intake_ns = cost.clock, cost.load, cost.intake_ns

    def stage_ns(self, work):
        n = work.num_decode_tokens
        mean = work.decode_context // n if n else 0
        like = (work.num_prefill_tokens.bit_length(), n.bit_length(), mean.bit_length())
        where = next(self._numbers) or like
        factor = 1 + self._bias + Random(f"{self._seed} {where}").gauss(0, self._noise)
        return [int(factor * time) for time in self._cost.stage_ns(work)]


def predicted(folder, name="formula"):
    """The cost model of the formulas."""
    return Profiled(profile=profile(folder, contents(checks=[]), name), shape=SHAPE, gpu=get_gpu("h200"))


def draw_checks(machine, *, seed, num=24):
    """As the profiler's: every third only decodes; small numbers as often as large ones."""
    dice = Random(seed)

    def draw(most):
        return int(most ** dice.random())

    checks = []
    for number in range(num):
        chunks = [[dice.choice((0, 400)), 15 + draw(500)] for _ in range(draw(4))] if number % 3 else []
        work = step(chunks, contexts := [15 + draw(900) for _ in range(draw(32))])
        sampled = {"num_sampled": work.num_sampled, "stage_ns": [int(time) for time in machine.stage_ns(work)]}
        checks.append({"chunks": chunks, "contexts": contexts, **sampled})
    return checks


def with_checks(folder, *, num=24, name="machine", seed=0, **errors):
    """A profile of a machine whose errors are known, and the machine."""
    machine = Machine(predicted(folder), seed=seed, **errors)
    return profile(folder, contents(checks=draw_checks(machine, seed=seed, num=num)), name), machine


def traffic(seed):
    """A burst, long enough for hundreds of steps of many compositions."""
    dice = Random(seed)
    return [arrival(n, prompt=dice.randint(20, 600), output=dice.randint(5, 60)) for n in range(16)]


def summary(cost, seed=0):
    record = play(traffic(seed), policy="sarathi:token_budget=256", cost=cost, max_num_seqs=12)
    return summarize(record, slo_ttft_s=None, slo_tpot_s=None)


def value(found, name):
    for key in name.split("."):
        found = found[key]
    return found


# --- errors of checks ------------------------------------------------------------------------------------------


def test_errors_by_kind_and_by_size_where_there_are_enough(tmp_path):
    made, _ = with_checks(tmp_path, bias=0.05, noise=0.01)
    small_decode, large_decode, small, large = calibrate(made).errors
    assert small_decode == large_decode
    assert [each.kind for each in (small_decode, small, large)] == [
        "decodes alone",
        "with chunks, small",
        "with chunks, large",
    ]
    ratios = [sum(stage_ns) / predicted(tmp_path).stage_ns(work)[0] for work, stage_ns in made.checks]
    assert sorted(small_decode.ratios + small.ratios + large.ratios) == sorted(ratios)
    assert [len(each.ratios) for each in (small_decode, small, large)] == [8, 8, 8]
    assert calibrate(made).most_small[0] is None
    most = calibrate(made).most_small[1]
    for each, chosen in ((small, lambda tokens: tokens <= most), (large, lambda tokens: tokens > most)):
        mixed = [check for check in made.checks if check.work.num_prefill_tokens]
        of_size = [c for c in mixed if chosen(c.work.num_prefill_tokens + c.work.num_decode_tokens)]
        assert each.ratios == tuple(sum(c.stage_ns) / predicted(tmp_path).stage_ns(c.work)[0] for c in of_size)


def test_a_kind_of_few_checks_shares_all(tmp_path):
    made, _ = with_checks(tmp_path, num=8, noise=0.02)  # three decode steps
    decodes, _, chunked, _ = calibrate(made).errors
    assert (len(decodes.ratios), len(chunked.ratios)) == (8, 5)
    assert calibrate(replace(made, checks=made.checks[:MIN_CHECKS])) is not None
    assert calibrate(replace(made, checks=made.checks[: MIN_CHECKS - 1])) is None


def test_statistics_by_hand():
    errors = Errors(kind="any", ratios=(1.0, 1.02, 1.04, 1.06))
    assert errors.mean == pytest.approx(1.03)
    assert errors.spread == pytest.approx((0.0020 / 3) ** 0.5)
    assert errors.standard_error == pytest.approx((0.0020 / 3) ** 0.5 / 2)
    draws = _deviations(errors.ratios)  # one of them at random spreads as the truth does, not as four ratios do
    assert sum(draws) == pytest.approx(0)
    assert sum(draw * draw for draw in draws) / 4 == pytest.approx(errors.spread**2)


# --- replicas --------------------------------------------------------------------------------------------------


SHARE_VARIANCE = 13 / 35 - 1 / 4
"""Of 3 w^2 - 2 w^3, where w is anywhere from 0 to 1."""


def same(*ratios):
    """A calibration whose ratios are of all steps."""
    return Calibration(errors=(Errors(kind="any", ratios=ratios),) * 4, most_small=(None, None))


def factors(cost, calibration, works, numbers=range(400)):
    base = [cost.stage_ns(work)[0] for work in works]
    for number in numbers:
        replica = ReplicaCost(cost, calibration, seed=7, number=number)
        yield [replica.stage_ns(work)[0] / time for work, time in zip(works, base, strict=True)]


def test_like_steps_are_off_alike_and_unlike_ones_by_what_they_have_in_common(tmp_path):
    cost, ratios = predicted(tmp_path), (0.97, 0.98, 1.0, 1.01, 1.02, 1.05, 1.06, 1.07)
    near, like, far = step(contexts=[500] * 9), step(contexts=[501] * 9), step(contexts=[100] * 30)
    found = list(factors(cost, same(*ratios), [near, like, far]))
    assert all(one == pytest.approx(other, abs=1e-5) for one, other, _ in found)
    mean = sum(one for one, _, _ in found) / 400
    variance = sum((one - mean) ** 2 for one, _, _ in found) / 400
    shared = sum((one - mean) * (other - mean) for one, _, other in found) / 400
    spread = Errors(kind="any", ratios=ratios).spread ** 2
    assert mean == pytest.approx(1.01, abs=0.005)  # half of the bias
    machines, bias = MACHINES**2 / 3, 0.02**2 * SHARE_VARIANCE
    assert shared == pytest.approx(spread / 8 * (SHARE_VARIANCE + 1 / 4) + machines + bias, rel=0.4)
    assert variance == pytest.approx(spread + shared, rel=0.2)


def test_what_comes_first_does_not_matter(tmp_path):
    cost, errors = predicted(tmp_path), same(0.9, 1.0, 1.1, 1.3)
    works = [step(contexts=[100 * n] * n) for n in range(1, 9)] + [step(chunks=[(0, 2**n)]) for n in range(9)]
    one, other = (ReplicaCost(cost, errors, seed=1, number=3) for _ in range(2))
    assert [one.stage_ns(work) for work in works] == [other.stage_ns(work) for work in works[::-1]][::-1]
    third = ReplicaCost(cost, errors, seed=1, number=4)
    assert [one.stage_ns(work) for work in works] != [third.stage_ns(work) for work in works]
    assert one.stage_ns(works[0]) == one.stage_ns(works[0])


def test_draws_are_the_same_on_every_machine(tmp_path):
    work = step(contexts=[500] * 9)
    found = [row[0] for row in factors(predicted(tmp_path), same(0.9, 1.0, 1.1, 1.3), [work], range(4))]
    assert found == pytest.approx([0.78372, 1.05928, 0.86797, 1.19565], abs=1e-5)


def test_the_rest_of_the_cost_is_as_predicted(tmp_path):
    cost = Profiled(profile=profile(tmp_path), shape=SHAPE, gpu=get_gpu("h200"), parallel=Parallel(pp=2))
    replica = ReplicaCost(cost, same(2.0, 2.0, 2.0, 2.0), seed=7, number=0)
    work = step(chunks=[(0, 100)], contexts=[70, 80])
    [[factor]] = factors(cost, same(2.0, 2.0, 2.0, 2.0), [work], [0])
    assert replica.stage_ns(work) == pytest.approx([factor * time for time in cost.stage_ns(work)], abs=1)
    assert (replica.num_stages, replica.host_ns, replica.return_ns) == (2, cost.host_ns, cost.return_ns)
    assert (replica.gap_ns(work), replica.transfer_ns(work)) == (cost.gap_ns(work), cost.transfer_ns(work))
    for name, row in cost.components(work).items():
        assert replica.components(work)[name] == pytest.approx([factor * time for time in row], rel=1e-5)
    assert (replica.clock, replica.load(work)) == (None, None)


def test_what_a_clock_stretches_is_off_as_the_step_is(tmp_path):
    made = profile(tmp_path, contents(clock=CLOCK))
    cost = Profiled(profile=made, shape=SHAPE, gpu=get_gpu("h200"))
    replica = ReplicaCost(cost, same(2.0, 2.0, 2.0, 2.0), seed=0, number=0)
    work = step(chunks=[(0, 100)], contexts=[70, 80])
    load, off = cost.load(work), replica.load(work)
    assert off.stage_ns == replica.stage_ns(work) != load.stage_ns
    assert off.stretched_ns[0] / load.stretched_ns[0] == pytest.approx(off.stage_ns[0] / load.stage_ns[0], rel=1e-5)
    assert (replica.clock, off.power) == (made.clock, load.power)


def test_no_step_goes_back_in_time(tmp_path):
    works = [step(contexts=[10 * 2**n] * 3) for n in range(10)]
    found = [row for rows in factors(predicted(tmp_path), same(0.05, 0.05, 0.05, 4.0), works) for row in rows]
    assert min(found) == pytest.approx(0.1, abs=1e-4)


# --- intervals -------------------------------------------------------------------------------------------------


def test_of_19_values_all_of_39_the_second_from_either_end():
    assert interval([*range(19)]) == (0, 18)
    assert interval([*range(39)][::-1]) == (1, 37)
    assert interval([*range(20)]) == pytest.approx((0.05, 18.95))
    assert interval([3] * 25) == (3, 3)


def test_a_bias_stretches_the_interval(tmp_path, monkeypatch):
    """Checks that take 5 % more than predicted: traffic may, too, or may not."""
    monkeypatch.setattr(calibration, "MACHINES", 0.0)
    made, machine = with_checks(tmp_path, bias=0.05, noise=0.0)
    cost = predicted(tmp_path)
    found = predict_intervals(summary, cost, calibrate(made), num_replicas=39).measures
    like_checks, like_tables = summary(machine), summary(cost)
    for name in ("output_tokens_per_s", "tpot_s.mean", "itl_s.p99", "ttft_s.p50", "duration_s"):
        least, most = sorted((value(like_checks, name), value(like_tables, name)))
        low, high = found[name]
        assert least <= low < least + 0.1 * (most - least)
        assert most - 0.1 * (most - least) < high <= most


def test_machines_of_a_kind_differ(tmp_path):
    cost, work = predicted(tmp_path), step(contexts=[500] * 9)
    found = [row[0] for row in factors(cost, same(1.0, 1.0, 1.0, 1.0), [work])]
    assert min(found) == pytest.approx(1 - MACHINES, abs=1e-3)
    assert max(found) == pytest.approx(1 + MACHINES, abs=1e-3)


@pytest.mark.parametrize("by_step", [False, True], ids=["off alike in like steps", "off anew in each step"])
def test_measured_runs_are_inside_in_about_nine_of_ten_cases(tmp_path, by_step):
    """Of machines that are off like their checks."""
    names = ("output_tokens_per_s", "tpot_s.mean", "itl_s.p99", "e2e_s.p90", "ttft_s.mean")
    inside = dict.fromkeys(names, 0)
    for seed in range(40):
        made, machine = with_checks(tmp_path, seed=seed, noise=0.03, bias=0.02, by_step=by_step)
        found = predict_intervals(
            lambda cost, seed=seed: summary(cost, seed),
            predicted(tmp_path),
            calibrate(made),
            num_replicas=20,
            seed=seed,
        )
        truth = summary(machine, seed)
        for name in names:
            low, high = found.measures[name]
            inside[name] += low <= value(truth, name) <= high
    assert all(30 <= count <= 40 for count in inside.values()), inside


def test_replicas_are_the_same_in_any_number_of_processes(capsys, tmp_path):
    with_checks(tmp_path, noise=0.03)
    words = [*REPLAY, "--profile", str(tmp_path / "machine.json"), "--replicas", "21", "--seed", "3", "--json"]
    found = []
    for jobs in ("1", "2"):  # later options win
        assert main([*words, "--jobs", jobs]) == 0
        found.append(json.loads(capsys.readouterr().out)["intervals"])
    assert found[0] == found[1]
    assert (found[0]["num_replicas"], found[0]["seed"]) == (21, 3)
    assert main([*words, "--jobs", "1", "--seed", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["intervals"]["measures"] != found[0]["measures"]


def test_a_replica_that_fails_names_itself(tmp_path):
    made, _ = with_checks(tmp_path, noise=0.03)
    with pytest.raises(ValueError, match="prediction intervals: replicas 0 to 4: out of luck"):
        predict_intervals(unlucky, predicted(tmp_path), calibrate(made), num_replicas=19, num_processes=2)
    with pytest.raises(ValueError, match="out of luck"):
        predict_intervals(unlucky, predicted(tmp_path), calibrate(made), num_replicas=19)


def unlucky(_):
    raise ValueError("out of luck")


# --- where they show -------------------------------------------------------------------------------------------


def test_a_replay_with_intervals(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    made, _ = with_checks(tmp_path, noise=0.03, bias=0.05)
    out = tmp_path / "out"
    words = [*REPLAY, "--profile", str(tmp_path / "machine.json"), "--out", str(out)]
    assert main(words) == 0
    plain_text, plain = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    plain_page = (out / "report.html").read_text()
    assert "intervals" not in plain
    assert not re.search("90% intervals|from ", plain_text)
    assert 'class="bounds"' not in plain_page
    assert main([words[0], "--intervals", *words[1:]]) == 0  # before TRACE, too
    text, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    found = report.pop("intervals")
    assert {**report, "wall_s": 0} == {**plain, "wall_s": 0}  # the run itself is what it was
    assert (found["level"], found["num_replicas"], found["seed"]) == (0.9, 20, 0)
    assert found["checks"] == calibrate(made).to_json()
    shown = ["output_tokens_per_s", "ttft_s.p99", "itl_s.mean", "bubble_fraction", "stages.0.busy_s", "kv_use.mean"]
    assert all(found["measures"][name][0] < found["measures"][name][1] for name in shown)
    assert found["measures"]["num_finished"] == [12, 12]
    assert not any(name.startswith(("wall_s", "config", "goodput.slo")) for name in found["measures"])
    low, high = found["measures"]["output_tokens_per_s"]
    summary_with = {**report, "intervals": found}
    pair = show_bounds((low, high), "rate")
    assert re.search(rf"output tokens/s +[\d.,]+  {re.escape(pair)} ", text)
    assert re.search(r"TPOT( +[\d.]+ .s){4} .\n.*from( +[\d.]+ .s){4} .\n.*to( +[\d.]+ .s){4} .\n", text)
    assert intervals_note(summary_with) in " ".join(text.split())
    page = (out / "report.html").read_text()
    check_page(page)
    assert f'<span class="bounds">{pair}</span>' in page
    assert escape(intervals_note(summary_with)) in page
    assert "bounds" not in re.search("<dt>finished</dt>.*?</dd>", page).group()


def test_bounds_of_a_summary():
    measures = {"ttft_s.p99": [1.0, 2.0], "num_finished": [3, 3], "num_iterations": [9.3, 12.7]}
    found = {"ttft_s": {"p99": 5.0}, "num_finished": 3, "num_iterations": 10, "intervals": {"measures": measures}}
    assert bounds(found, ("ttft_s", "p99")) == (1.0, 2.0)
    assert bounds(found, ("num_finished",)) is None
    assert bounds({**found, "num_finished": 4}, ("num_finished",)) == (3, 3)
    assert bounds(found, ("num_rejected",)) is bounds({}, ("ttft_s", "p99")) is None
    assert show_bounds(bounds(found, ("num_iterations",)), "count") == "9 to 13"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--profile", "none", "--intervals"], "a roofline has no measured steps to take them from; name a profile"),
        (["--profile", "FILE", "--intervals"], r"profile formula holds 2 steps measured as a check, of which 4 are"),
        (["--profile", "none", "--replicas", "18"], "'18' is not a whole number of at least 19"),
    ],
)
def test_where_there_is_nothing_to_take_them_from(capsys, tmp_path, words, complaint):
    path = str(written(tmp_path))
    try:
        status = main([*REPLAY, *(path if word == "FILE" else word for word in words)])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"gllm: error: .*--(intervals|replicas): {complaint}.*\n", err)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A run on a machine whose steps take 6 % more than its profile predicts, and that profile."""
    with_checks(tmp_path, noise=0.01, bias=0.06, name="slow")
    config = replace(BASE, profile=str(tmp_path / "slow.json"), parallel=Parallel())
    resolve = type(config).resolve

    def on_machine(self):
        setup = resolve(self)
        return replace(setup, cost=Machine(setup.cost, seed=0, noise=0.01, bias=0.06))

    with monkeypatch.context() as patch:
        patch.setattr(type(config), "resolve", on_machine)
        patch.setattr("gllm.sim.run._described", lambda setup, _: replace(setup, profile=None).to_json())
        record_run(tmp_path / "run", small_trace(1, gap_ns=0), config)
    return tmp_path / "run", tmp_path / "slow.json"


def test_fidelity_says_whether_measured_values_are_inside(capsys, measured, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    run, path = measured
    words = ["fidelity", str(run), "--profile", str(path), "--jobs", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    rows = {row["label"]: row for row in found["metrics"]}
    speed = rows["output tokens/s"]
    assert speed["passes"] is False
    low, high = speed["interval"]
    assert low < speed["measured"] < speed["simulated"] < high
    assert speed["is_inside"] is True
    inside = [row["is_inside"] for row in found["metrics"] if row["is_inside"] is not None]
    made = found["intervals"]
    assert (made["num_inside"], made["num_known"]) == (inside.count(True), len(inside))
    assert made["num_inside"] > 0.75 * made["num_known"] > 20
    assert (made["num_replicas"], made["seed"], made["level"]) == (20, 0, 0.9)
    assert "measures" not in made
    assert f"measured values inside their 90 % intervals: {made['num_inside']} of {made['num_known']}\n" in text
    pair = show_bounds((low, high), "rate")
    assert re.search(rf"output tokens/s +[\d,]+ +[\d,]+ +{pair} +yes", text)
    page = (tmp_path / "out" / "fidelity.html").read_text()
    check_page(page)
    assert f"<td>{pair}</td><td>yes</td>" in page
    assert main([*words, "--no-intervals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["intervals"] is None
    assert {row["interval"] for row in found["metrics"]} == {row["is_inside"] for row in found["metrics"]} == {None}


def test_a_value_outside_is_marked(measured, tmp_path):
    """By a profile whose checks agree with it, on the machine that takes 6 % more."""
    run, _ = measured
    with_checks(tmp_path, noise=0.002, name="fast")
    runs = read_runs([str(run)])
    setup = sim_config(runs[0], gpu="h200", profile=str(tmp_path / "fast.json"), constants=BASE.constants).resolve()
    found = compare(runs, setup, tmp_path / "log", bar=2.0, num_replicas=19)
    speed = next(row for row in found.metrics if row.label == "output tokens/s")
    assert speed.is_inside is False
    assert speed.interval_cells()[-1] == "NO"
    assert pickle.loads(pickle.dumps(runs[0])).recording.arrivals == runs[0].recording.arrivals  # noqa: S301 - ours
