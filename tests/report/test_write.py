import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from report.made import REJECTED, STOP, at_random, by_hand, record
from report.pages import check_page

from gllm.report.files import replacing
from gllm.report.metrics import summarize
from gllm.report.write import write_run

FILES = {"report.json", "record.npz", "report.html", "requests.csv", "timeline.json"}
LONE = record(
    requests=[(0, 0, 1, 1, 5, 1, 0, 0, STOP)],
    batches=[(0, 5, 0, 5, 0, 1, -1, 0)],
    stages=[[(0, 0.5), (0.5, 1)]],
    done=[1],
)
STAGELESS = record(batches=[(0, 5, 0, 5, 0, 1, -1, 0)], done=[1], num_stages=0)
REJECTIONS = record(requests=[(t, -1, -1, t, 5, 0, 0, 0, REJECTED) for t in (0, 0, 0)])


def refuse(constant):
    raise AssertionError(constant)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    "made",
    [by_hand(), record(), STAGELESS, REJECTIONS, LONE, by_hand(config={}, decision_sha256=None)],
    ids=["by hand", "empty", "no stage", "all rejected", "one request", "no configuration"],
)
def test_a_run_of_any_kind_can_be_written(tmp_path, made):
    found = write_run(tmp_path / "new", made, slo_ttft_s=1.0, slo_tpot_s=None)
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    assert load(tmp_path / "new/report.json") == found == summarize(made, slo_ttft_s=1.0, slo_tpot_s=None)
    check_page((tmp_path / "new/report.html").read_text(encoding="utf-8"))
    load(tmp_path / "new/timeline.json")
    assert len(pd.read_csv(tmp_path / "new/requests.csv")) == made.requests.size


def test_the_page_shows_every_plot_and_escapes_what_it_is_told(tmp_path):
    config = {
        "model": "<b>x</b>",
        "policy": {"name": "a&b"},
        "deep": {"list": [1, 2], "evil": "<script>alert(1)</script>"},
    }
    write_run(tmp_path, by_hand(config=config), slo_ttft_s=1.0, slo_tpot_s=1.0)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert check_page(html) == 8
    for text in ("&lt;b&gt;x&lt;/b&gt;", "a&amp;b", "<td>deep.list</td><td>1, 2</td>", "deep.evil", "ab" * 32):
        assert text in html


def test_equal_runs_give_equal_files(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, by_hand())
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_requests_csv(tmp_path):
    write_run(tmp_path, by_hand())
    table = pd.read_csv(tmp_path / "requests.csv")
    assert table["status"].tolist() == ["stop", "length", "rejected", "abort"]
    assert table["ttft_s"].fillna(-1).tolist() == [2, 3, -1, -1]
    assert table["tpot_s"].fillna(-1).tolist() == [2, -1, -1, -1]
    assert table["num_cached_tokens"].tolist() == [4, 0, 0, 0]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_run(tmp_path, by_hand())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_long_run_is_written_fast_and_small(tmp_path):
    made = at_random(300_000, 20_000)
    begin = time.process_time()
    summarize(made, slo_ttft_s=None, slo_tpot_s=None)
    assert time.process_time() - begin < 1
    write_run(tmp_path, made)
    assert time.process_time() - begin < 7
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert check_page(html) == 8
    assert len(html) < 1_500_000


def test_stage_strips_and_series_keep_their_totals():
    from gllm.report.series import clock, held_mean, occupancy

    made = at_random(5000, 100)
    at = clock(made, 333)
    found = summarize(made, slo_ttft_s=None, slo_tpot_s=None)
    busy_s = occupancy(made, at).sum(axis=1) * at.width_s
    assert busy_s == pytest.approx([stage["busy_s"] for stage in found["stages"]])
    ones = held_mean(made, np.ones(5000), at)
    assert 0 <= ones.min() <= ones.max() <= 1 + 1e-9


def test_importing_the_report_stays_light():
    code = (
        "import sys, gllm.report.write, gllm.report.comparison, gllm.report.table;"
        "print([name for name in ('pandas', 'matplotlib', 'rich', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"  # noqa: S603
