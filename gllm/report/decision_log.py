"""`iterations.jsonl.gz`: every turn of an engine as one line of JSON, and the digest of its decisions.

    {"t":ns,"done":[[plan,[[id,reason],...]],...],"arrived":[id,...],"aborted":[id,...],
     "plans":[decision,...],"events":[[name,...],...],"wait":reason,"until":ns}

    decision  {"plan":id,"prefill":[[id,start,num_tokens],...],"decode":num_tokens,"previous":id,"joined":[id,...],
               "left":[id,...],"grown":[[id,block],...],"preempted":[id,...],"free":num_blocks}, then "saw":{...}

The decoding members of a plan are those of plan "previous", less "left", plus "joined" (less those whose length
ended with it). A decision holds no time, so that runs that decide alike have equal digests whatever their clocks said:
the SHA-256 covers the decisions alone, in order, each as above and followed by a newline. What the policy saw ("saw",
in a log whose engine keeps snapshots) is not covered; "until" is there only where the policy waits for a time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self, get_args

from gllm.core import Event, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from gllm.core import Plan, Request, StepResult, Turn

LOG_NAME = "iterations.jsonl.gz"
_LEVEL = 1  # of compression: level 6 takes three times as long for a quarter less
_MANY = 512  # lines that are compressed at once

_SAW = ',"saw":{' + ",".join(f'"{name}":%d' for name in Snapshot._fields) + "}"
_FIELDS = {kind: [field.name for field in fields(kind)] for kind in get_args(Event)}
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False).encode


def decision_line(plan: Plan) -> str:
    """The decision behind a plan as canonical JSON. To be taken in the turn that made it: plans go on."""
    prefill = ",".join([f"[{chunk.sequence.id},{chunk.start},{chunk.num_tokens}]" for chunk in plan.chunks])
    joined = _numbers([entry.sequence.id for entry in plan.joined])
    left = _numbers(plan.left)
    grown = ",".join([f"[{sequence.id},{block}]" for sequence, block in plan.grown])
    return (
        f'{{"plan":{plan.id},"prefill":[{prefill}],"decode":{plan.num_decode_tokens},"previous":{plan.previous},"joined":[{joined}],'
        f'"left":[{left}],"grown":[{grown}],"preempted":[{_numbers(plan.preempted)}],"free":{plan.num_free_blocks}}}'
    )


class DecisionLog:
    """Writes a log, which appears under its name when it is closed, and hashes its decisions.

    A context manager: closed at the end of the block, discarded after an exception.
    With `path` None nothing is written; the digest is still taken.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self._file: gzip.GzipFile | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            self._raw = self._temporary.open("wb")
            # Neither name nor date of the file: equal runs make equal bytes.
            self._file = gzip.GzipFile("", "wb", _LEVEL, self._raw, mtime=0)

    @property
    def sha256(self) -> str:
        """Digest of the decisions so far."""
        return self._hash.hexdigest()

    def write(
        self,
        now: int,
        results: Iterable[StepResult],
        requests: Iterable[Request],
        aborts: Iterable[int],
        turn: Turn,
    ) -> None:
        """Note one turn, right after it was taken."""
        decisions = [decision_line(plan) for plan in turn.plans]
        for decision in decisions:
            self._hash.update(f"{decision}\n".encode())
        if self._file is None:
            return
        wait, events = turn.wait, turn.events
        done = ",".join([_result(result) for result in results])
        plans = ",".join(map(_with_view, decisions, turn.plans))
        until = "" if wait.until_ns is None else f',"until":{wait.until_ns}'
        self._lines.append(
            f'{{"t":{now},"done":[{done}],"arrived":[{_numbers([request.id for request in requests])}],'
            f'"aborted":[{_numbers(aborts)}],"plans":[{plans}],"events":{_events(events) if events else "[]"},'
            f'"wait":"{wait.reason}"{until}}}\n'
        )
        if len(self._lines) == _MANY:
            self._flush()

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._file is None or self._path is None:
            return
        try:
            self._flush()
            self._end()
            self._temporary.replace(self._path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave no file behind; an older one of that name stays as it was."""
        if self._path is not None:
            self._end()
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        assert self._file is not None  # noqa: S101 - lines are kept for a file alone
        self._file.write("".join(self._lines).encode())
        self._lines.clear()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with self._raw:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The turns of a log, lazily; `path` may be the folder that holds one.

    Raises:
        ValueError: There is no such log, or it is damaged: one line that names file and line.
    """
    if path.is_dir():
        path /= LOG_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such log; replay with --out and without --no-iterations")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 - errors name it
                yield _turn(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error}); replay it again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: not a turn of a decision log ({error}); replay it again") from None


def read_decisions(path: Path) -> Iterator[dict[str, Any]]:
    """The decisions of a log in order, each with the time of its turn as "t"."""
    for turn in read_log(path):
        for decision in turn["plans"]:
            yield {"t": turn["t"], **decision}


def canonical(decision: Mapping[str, Any]) -> str:
    """A decision that was read, as the line that its digest covers."""
    return _encode({key: value for key, value in decision.items() if key not in ("t", "saw")})


def _turn(line: str) -> dict[str, Any]:
    turn = json.loads(line)
    if not isinstance(turn, dict) or not {"t", "done", "arrived", "aborted", "plans", "events", "wait"} <= turn.keys():
        raise ValueError("keys are missing")
    if not all("plan" in decision for decision in turn["plans"]):
        raise ValueError("a decision has no plan")
    return turn


def _with_view(decision: str, plan: Plan) -> str:
    return decision if plan.saw is None else f"{decision[:-1]}{_SAW % plan.saw}}}"


def _numbers(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _result(result: StepResult) -> str:
    stopped = result.stopped and ",".join([f"[{entry.id},{_encode(entry.reason)}]" for entry in result.stopped])
    return f"[{result.plan},[{stopped or ''}]]"


def _events(events: Iterable[Event]) -> str:
    return _encode([[type(event).__name__, *map(event.__getattribute__, _FIELDS[type(event)])] for event in events])
