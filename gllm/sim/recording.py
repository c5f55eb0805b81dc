"""A run folder that the runtime's replay wrote, as what its engine was told and when.

    report.json          "config" has the "policy" and the "limits"; "decision_sha256" names the log it belongs to
    iterations.jsonl.gz  the decision log: each turn, its time, what came back, who arrived, who was aborted
    trace.jsonl.gz       the requests as submitted, in our own format: row n is request n, its hash_ids are the
                         engine's block hashes; those beyond the prompt's full blocks name the blocks of its output

True lengths are the log's: who stopped by itself did so after as many tokens as its end tells.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.console.output import TRACE_NAME
from gllm.core import Finished, Limits, Rejected, Request
from gllm.policy import parse_policy
from gllm.report.decision_log import LOG_NAME, canonical, read_log
from gllm.report.files import REPORT_NAME
from gllm.sim.driver import Arrival
from gllm.trace import FORMATS, TraceError, TraceRequest
from gllm.trace.lines import open_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gllm.core import Policy

ENDLESS = 1 << 60
"""The true length of a request that does not stop by itself: its length limit, an abort or an error ends it."""


class Told(NamedTuple):
    """One sequence that a result names. `given`: no true length foretells it, so that the simulator takes it over.

    Such are errors, a stop with the very token that the length limit ends with, which to a simulator is no stop at
    all, and what a worker says of sequences that have ended already.
    """

    id: int
    reason: str
    given: bool


class Moment(NamedTuple):
    """One recorded turn. `decisions` is a hash of its decisions, to see where a simulation leaves the record."""

    now_ns: int
    plan: int | None  # whose result came back
    arrived: Sequence[int]
    aborted: Sequence[int]
    decisions: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing happened but that the policy's time had come."""
        return self.plan is None and not self.arrived and not self.aborted


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recorded run: what its engine was, what it was told, and the digest of what it decided."""

    policy_spec: str
    policy: Policy
    limits: Limits
    moments: Sequence[Moment]
    arrivals: Sequence[Arrival]  # by request id
    stop_hashes: Sequence[Sequence[int]]  # by request id: of prompt and output, where the worker knew them
    due_ns: Sequence[int]  # by request id: when the engine was told of it
    returns_ns: Sequence[int]  # by plan: when its result was back; plans still on the road at the end are not there
    told: Sequence[Sequence[Told]]  # by plan: whom its result named
    num_decisions: int
    num_unfinished: int  # requests that had not ended at the end of the log
    has_views: bool  # the decisions tell what the policy saw
    sha256: str  # of the log's decisions
    reported_sha256: str | None  # what the report says of them


def read_recording(run: Path) -> Recording:
    """Read the folder and see that its files belong together.

    Raises:
        ValueError: One line: the file, what is wrong with it, and where.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; name one that `python -m gllm.runtime replay --out` wrote")
    policy_spec, limits, reported = _read_report(run / REPORT_NAME)
    requests, hashes = _read_requests(run / TRACE_NAME, limits)
    log = _Log([_most_output_tokens(request, limits) for request in requests])
    for number, turn in enumerate(read_log(run / LOG_NAME), start=1):
        log.add(turn, f"{run / LOG_NAME}, turn {number}")
    if len(log.due_ns) != len(requests):
        raise ValueError(
            f"{run}: {TRACE_NAME} has {len(requests):,} requests, {LOG_NAME} only {len(log.due_ns):,}; "
            "they are not of one run"
        )
    return Recording(
        policy_spec=policy_spec,
        policy=parse_policy(policy_spec),
        limits=limits,
        moments=log.moments,
        arrivals=[Arrival(request, log.lengths.get(request.id, ENDLESS)) for request in requests],
        stop_hashes=hashes,
        due_ns=log.due_ns,
        returns_ns=log.returns_ns,
        told=log.told,
        num_decisions=log.num_decisions,
        num_unfinished=len(log.due_ns) - len(log.ended),
        has_views=log.has_views,
        sha256=log.digest.hexdigest(),
        reported_sha256=reported,
    )


def _read_report(path: Path) -> tuple[str, Limits, str | None]:
    """Policy, limits and the decisions' digest."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        config = report["config"]
        policy, limits = config["policy"], Limits(**config["limits"])
        parse_policy(policy)
        return policy, limits, report.get("decision_sha256")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a run's folder holds its report, log and trace") from None
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing; replay it again") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a run's report ({error}); replay it again") from None


def _read_requests(path: Path, limits: Limits) -> tuple[list[Request], list[tuple[int, ...]]]:
    """The rows as they stand, neither sorted nor moved nor left out, and of each the hashes when it stops."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; only the runtime's replay writes the requests as they were submitted")
    requests: list[Request] = []
    hashes: list[tuple[int, ...]] = []
    with open_lines(path) as lines:
        try:
            header = next(lines, "")
            if FORMATS["gllm"].missing(header):
                raise TraceError("does not begin with the header of a gllm trace; replay it again")
            for row in FORMATS["gllm"].read(chain([header], lines)):
                request = _request(len(requests), row, limits.block_size)
                requests.append(request)
                hashes.append(row.hash_ids if len(row.hash_ids) > len(request.block_hashes) else ())
        except ValueError as error:
            raise ValueError(f"{path}, row {lines.number}: {error}") from None
    return requests, hashes


def _request(number: int, row: TraceRequest, block_size: int) -> Request:
    if row.arrival_ns is None:
        raise TraceError("has no arrival_ns")
    if row.hash_ids and row.hash_block_size != block_size:
        raise TraceError(f"hash_block_size is {row.hash_block_size}, the engine's blocks hold {block_size} tokens")
    return Request(
        id=number,
        num_prompt_tokens=row.num_prompt_tokens,
        arrival_ns=row.arrival_ns,
        max_tokens=row.max_tokens,
        priority=row.priority,
        deadline_ns=row.deadline_ns,
        block_hashes=row.hash_ids[: row.num_prompt_tokens // block_size],
    )


def _most_output_tokens(request: Request, limits: Limits) -> int:
    room = limits.max_tokens_per_sequence - request.num_prompt_tokens
    return room if request.max_tokens is None else min(room, request.max_tokens)


class _Log:
    """Takes in a log turn by turn; `most` is by request the most output tokens it may come to."""

    def __init__(self, most: Sequence[int]) -> None:
        self._most = most
        self.moments: list[Moment] = []
        self.due_ns: list[int] = []
        self.returns_ns: list[int] = []
        self.told: list[list[Told]] = []
        self.lengths: dict[int, int] = {}
        self.ended: set[int] = set()
        self.num_decisions = 0
        self.has_views = False
        self.digest = hashlib.sha256()

    def add(self, turn: dict[str, Any], where: str) -> None:
        """One turn; `where` is what an error names."""
        try:
            now, arrived, aborted = turn["t"], tuple(turn["arrived"]), tuple(turn["aborted"])
            self._check_time(now)
            ends = _ends(turn["events"])
            plan = self._result(turn["done"], now, ends)
            self.ended.update(ends)
            self._arrive(arrived, now)
            _check_ids(aborted)
            self.moments.append(Moment(now, plan, arrived, aborted, self._decisions(turn["plans"])))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: not as an engine's log has it ({error}); replay it again") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _check_time(self, now: object) -> None:
        last = self.moments[-1].now_ns if self.moments else -1
        if type(now) is not int or now <= last:
            raise ValueError(f"is at {now!r} ns, and the turn before at {last} ns; each turn has a time of its own")

    def _result(self, done: list[Any], now: int, ends: dict[int, int]) -> int | None:
        if not done:
            return None
        if len(done) > 1:
            raise ValueError(f"has {len(done)} results; an engine's loop hands in one a turn")
        [[plan, entries]] = done
        if plan != len(self.returns_ns):
            raise ValueError(f"has the result of plan {plan}; plan {len(self.returns_ns)} is the next to come back")
        if plan >= self.num_decisions:
            raise ValueError(f"has the result of plan {plan} before its decision")
        gone = self.ended.union(key for key, reason in entries if reason == "error")
        told = []
        for key, reason in entries:
            at_limit = ends.get(key) == self._most[key]
            told.append(Told(key, reason, reason == "error" or key in gone or at_limit))
            if not told[-1].given and key in ends:
                self.lengths[key] = ends[key]
        self.returns_ns.append(now)
        self.told.append(told)
        return len(self.told) - 1

    def _arrive(self, arrived: Sequence[int], now: int) -> None:
        for key in arrived:
            if key != len(self.due_ns):
                raise ValueError(f"request {key} arrives; {len(self.due_ns)} is the next")
            if key >= len(self._most):
                raise ValueError(f"request {key} arrives; {TRACE_NAME} has {key:,}, so they are not of one run")
            self.due_ns.append(now)

    def _decisions(self, decisions: list[dict[str, Any]]) -> int:
        lines = [canonical(decision) for decision in decisions]
        for line in lines:
            self.digest.update(f"{line}\n".encode())
        self.num_decisions += len(lines)
        self.has_views = self.has_views or any("saw" in decision for decision in decisions)
        return hash(tuple(lines))


def _ends(events: list[list[Any]]) -> dict[int, int]:
    """Of each request that ended in a turn its output tokens."""
    ends = {}
    for name, key, *rest in events:
        if name == Finished.__name__:
            ends[key] = int(rest[1])
        elif name == Rejected.__name__:
            ends[key] = 0
    return ends


def _check_ids(keys: Sequence[object]) -> None:
    if not all(type(key) is int for key in keys):
        raise ValueError(f"names {keys} as requests; they have numbers")
