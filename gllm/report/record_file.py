"""`record.npz`: the columns of a run, from which every measure can be taken again.

    num_blocks, block_size             of the cache
    requests.NAME, batches.NAME, ...   the columns of `RunRecord`; a table's columns each by its name

A column is kept as differences from row to row (the first row as it is) in the smallest integers that hold them,
which zip well. What else a `RunRecord` holds stands in the report.json beside it: without it, no configuration.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from gllm.report.files import RECORD_NAME, REPORT_NAME, replacing_bytes
from gllm.report.record import BATCH_DTYPE, GAP_DTYPE, REQUEST_DTYPE, RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_TABLES = {"requests": REQUEST_DTYPE, "batches": BATCH_DTYPE, "gaps": GAP_DTYPE}
_SIZES = ("num_blocks", "block_size")
_REPORTED = ("config", "mode", "wall_s", "decision_sha256")
_SMALL = (np.int8, np.int16, np.int32)


def write_record(directory: Path, record: RunRecord) -> None:
    """Write the columns beside the run's report; equal runs give equal files."""
    sizes = {name: np.int64(getattr(record, name)) for name in _SIZES}
    with replacing_bytes(directory / RECORD_NAME) as file:
        np.savez_compressed(file, allow_pickle=False, **sizes, **dict(_packed(record)))


def read_record(directory: Path) -> RunRecord:
    """The record of a run whose folder this is.

    Raises:
        ValueError: One line: the file, and what is wrong with it.
    """
    report = read_report(directory)
    path = directory / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the run was written by an older gLLM, replay it again")
    try:
        with np.load(path) as arrays:
            values = _unpacked({name: arrays[name] for name in arrays.files})
        return RunRecord(**{name: report[name] for name in _REPORTED}, **values)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error.args[0]}; replay the run again") from None
    except (BadZipFile, EOFError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not a run's columns ({error}); replay the run again") from None


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a run whose folder this is; it has a mode and a configuration.

    Raises:
        ValueError: One line: the file, and what is wrong with it.
    """
    path = directory / REPORT_NAME
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = next((name for name in _REPORTED if name not in report), None)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a folder that a replay wrote with --out") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a run's report ({error}); replay it again") from None
    if missing is not None:
        raise ValueError(f"{path}: {missing} is missing; replay it again")
    return report


def _packed(record: RunRecord) -> Iterator[tuple[str, NDArray[Any]]]:
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in _TABLES:
            yield from ((f"{field.name}.{name}", _differences(value[name])) for name in value.dtype.names)
        elif isinstance(value, np.ndarray):
            yield field.name, _differences(value)


def _differences(column: NDArray[Any]) -> NDArray[Any]:
    steps = np.diff(column.astype(np.int64), axis=0, prepend=np.zeros_like(column[:1], dtype=np.int64))
    low, high = steps.min(initial=0), steps.max(initial=0)
    fitting = (kind for kind in _SMALL if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return steps.astype(next(fitting, np.int64))


def _unpacked(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The values of a `RunRecord` as far as the file holds them."""
    sizes = {name: int(arrays[name]) for name in _SIZES}
    columns = {name: array.cumsum(axis=0, dtype=np.int64) for name, array in arrays.items() if name not in _SIZES}
    plain = {name: column for name, column in columns.items() if "." not in name}
    tables = {name: _table(name, columns, dtype) for name, dtype in _TABLES.items()}
    values = {**tables, **plain}
    _check(values)
    return {**sizes, **values}


def _table(name: str, columns: Mapping[str, NDArray[Any]], dtype: np.dtype[np.void]) -> NDArray[np.void]:
    names = dtype.names or ()
    table = np.zeros(columns[f"{name}.{names[0]}"].shape, dtype)
    for column in names:
        table[column] = columns[f"{name}.{column}"]
    return table


def _check(values: Mapping[str, NDArray[Any]]) -> None:
    """Columns of batches are equally long."""
    per_batch = ("batches", "done_ns", "num_discarded", "stage_start_ns", "stage_end_ns")
    lengths = [len(values[name]) for name in per_batch]
    if len(set(lengths)) > 1:
        raise ValueError(f"{', '.join(per_batch)} have {', '.join(map(str, lengths))} rows")
