import csv
import io
import json

import pytest
from report.made import by_hand, record
from report.pages import check_page
from rich.console import Console

from gllm.report.comparison import write_comparison
from gllm.report.metrics import summarize
from gllm.report.rows import best, seconds, significant
from gllm.report.table import comparison_table, run_table


def run(policy, rate, made=None, **changes):
    summary = summarize(made or by_hand(), slo_ttft_s=2.5, slo_tpot_s=None)
    return {**summary, "policy": policy, "rate_per_s": rate, **changes}


def read(folder):
    return (folder / "compare.html").read_text(encoding="utf-8")


def test_a_sweep_draws_curves_and_writes_all_three_files(tmp_path):
    runs = [run(policy, rate) for policy in ("wt+ut", "<plain>") for rate in (4.0, 1.0, 2.0)]
    found = write_comparison(tmp_path, runs, title="Ablation & co")
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    assert [r["rate_per_s"] for r in found["runs"]] == [1, 1, 2, 2, 4, 4]
    rows = list(csv.DictReader((tmp_path / "compare.csv").open(encoding="utf-8")))
    assert len(rows) == 6
    assert (rows[0]["policy"], rows[0]["ttft_s.p50"]) == ("wt+ut", "2.5")
    assert check_page(read(tmp_path)) == 5
    assert "Ablation &amp; co" in read(tmp_path)
    assert "&lt;plain&gt;" in read(tmp_path)
    assert read(tmp_path).count("<details") == 3


@pytest.mark.parametrize("rate", [None, 8.0])
def test_one_rate_draws_bars_and_marks_the_best(tmp_path, rate):
    write_comparison(tmp_path, [run("a", rate), run("b", rate, bubble_fraction=0.1)])
    assert check_page(read(tmp_path)) == 5
    assert read(tmp_path).count('class="best"') == 1
    assert '<td class="best">10.0%</td>' in read(tmp_path)


@pytest.mark.parametrize("rates", [(None,), (1.0, 2.0)])
def test_runs_without_values_can_be_compared(tmp_path, rates):
    write_comparison(tmp_path, [run(policy, rate, record()) for policy in "ab" for rate in rates])
    check_page(read(tmp_path))


def test_latencies_far_apart_get_a_logarithmic_axis(tmp_path):
    slow = {"mean": 100.0, "p50": 100.0, "p90": 100.0, "p99": 100.0}
    write_comparison(tmp_path, [run("a", 1.0), run("a", 2.0, ttft_s=slow)])
    check_page(read(tmp_path))


def test_many_policies_can_be_compared(tmp_path):
    write_comparison(tmp_path, [run(f"policy {i}", rate) for i in range(11) for rate in (1.0, 2.0)])
    check_page(read(tmp_path))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "nothing to compare"),
        ([{"policy": "a"}], "lacks rate_per_s"),
        ([{"policy": "a", "rate_per_s": 1.0}] * 2, "occurs twice"),
        ([{"policy": "a", "rate_per_s": 1.0}, {"policy": "a", "rate_per_s": None}], "either every"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, runs, message):
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path, runs)
    assert not list(tmp_path.iterdir())


def shown(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_the_terminal_table_has_every_section():
    text = shown(run_table(run("a", None), title="run"))
    for word in ("Traffic", "Latency", "Throughput", "Pipeline", "Cache", "2.50 s", "p99", "43.8%"):
        assert word in text


def test_the_terminal_table_of_an_empty_run():
    assert "–" in shown(run_table(run("a", None, record())))  # noqa: RUF001


def test_the_terminal_comparison_stars_the_best():
    text = shown(comparison_table([run("a", 1.0), run("b", 1.0, bubble_fraction=0.1)], ["[a]", "b"]))
    assert "[a]" in text
    assert "*10.0%" in text
    assert text.count("*") == 2  # the caption explains the star


@pytest.mark.parametrize(
    ("values", "better", "expected"),
    [
        ([3, 1, 2], "low", {1}),
        ([3, 1, 3], "high", {0, 2}),
        ([1, None, 2], "low", {0}),
        ([1, 1], "low", set()),
        ([None, None], "high", set()),
        ([1, 2], "", set()),
    ],
)
def test_best(values, better, expected):
    assert best(values, better) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 µs"),
        (5e-5, "50.0 µs"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (599, "599 s"),
        (900, "15.0 min"),
        (7.2e4, "20.0 h"),
    ],
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_significant_digits():
    assert [significant(v) for v in (0, 0.1234, 1.234, 12.34, 123.4, 12345.6)] == [
        "0",
        "0.123",
        "1.23",
        "12.3",
        "123",
        "12,346",
    ]
