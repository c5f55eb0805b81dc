import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from report.made import at_random, by_hand, record

from gllm.report.metrics import summarize
from gllm.report.record_file import read_record, write_record
from gllm.report.write import write_json, write_run

EXTREMES = record(batches=[(0, 5, 0, 2**62, 0, 1, -1, 0), (1, 3, 1, -(2**62), 0, 0, 0, 0)], stages=[[(0, 1)] * 2] * 2)


@pytest.mark.parametrize(
    "made",
    [by_hand(), at_random(3000, 200), record(), record(num_stages=0), EXTREMES],
    ids=["by hand", "random", "empty", "no stage", "extremes"],
)
def test_what_was_written_is_read(made, tmp_path):
    made = replace(made, done_ns=made.done_ns if made.done_ns.size else np.zeros(made.batches.size, np.int64))
    write_run(tmp_path, made)
    found = read_record(tmp_path)
    for field in fields(made):
        one, other = getattr(made, field.name), getattr(found, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype.names == other.dtype.names
            assert one.shape == other.shape
            assert one.tolist() == other.tolist(), field.name
        else:
            assert one == other
    assert summarize(found, slo_ttft_s=1.0, slo_tpot_s=None) == summarize(made, slo_ttft_s=1.0, slo_tpot_s=None)


def test_columns_take_few_bytes(tmp_path):
    made = at_random(20_000, 1000)
    write_record(tmp_path, made)
    assert (tmp_path / "record.npz").stat().st_size < 0.25 * 8 * 20_000 * 18


def changed(folder, **changes):
    path = folder / "record.npz"
    with np.load(path) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    values |= changes
    np.savez(path, **{name: value for name, value in values.items() if value is not None})


def reported(folder, **changes):
    report = {**json.loads((folder / "report.json").read_text()), **changes}
    write_json(folder / "report.json", {name: value for name, value in report.items() if value != "gone"})


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda run: (run / "record.npz").unlink(), "record.npz: no such file; the run was written by an older gLLM"),
        (lambda run: (run / "record.npz").write_bytes(b""), "record.npz: not a run's columns"),
        (lambda run: (run / "record.npz").write_bytes(b"nonsense"), "record.npz: not a run's columns"),
        (
            lambda run: (run / "record.npz").write_bytes((run / "record.npz").read_bytes()[:900]),
            "record.npz: not a run's",
        ),
        (lambda run: changed(run, num_blocks=None), "record.npz: has no num_blocks"),
        (lambda run: changed(run, **{"requests.status": None}), "record.npz: has no requests.status"),
        (lambda run: changed(run, **{"requests.status": np.zeros(3)}), "record.npz: not a run's columns"),
        (
            lambda run: changed(run, done_ns=np.zeros(4, np.int8)),
            "record.npz: not a run's columns .*have 5, 4, 5, 5, 5",
        ),
        (lambda run: (run / "report.json").unlink(), "report.json: no such file"),
        (lambda run: (run / "report.json").write_text("{"), "report.json: not a run's report"),
        (lambda run: reported(run, mode="gone"), "report.json: mode is missing"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path, spoil, complaint):
    write_run(tmp_path, by_hand())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
        read_record(tmp_path)
    assert re.search(complaint, str(caught.value))
    assert "\n" not in str(caught.value)
