"""Recorded runs without workers: a small event loop that drives an engine, and the folder it leaves.

The loop is a shell of its own: nothing of gllm.sim is in it. Its rules are those of an engine's loop on real
workers: a turn at a time, at most one result in each, in the order of plans; arrivals wait while the pipeline is
full; aborts do not. The checked shell of tests/core keeps the tokens.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass, field
from random import Random

from core.driving import Shell
from core.traffic import draw_request

from gllm.core import Limits, Preempted, Request, Stopped
from gllm.report.decision_log import LOG_NAME, DecisionLog
from gllm.trace import Trace, TraceRequest, write_trace

NEVER = 1 << 62


@dataclass
class Coming:
    """A request on its way to the engine."""

    request: Request
    length: int
    hashes: tuple[int, ...]  # of prompt and output; empty: the worker knows none


@dataclass
class Script:
    """What will happen to a run, and when."""

    arrivals: list[Coming] = field(default_factory=list)  # by request.arrival_ns
    aborts: list[tuple[int, int]] = field(default_factory=list)  # (time, id)
    fail: float = 0.0  # share of results in which some sequence fails
    hasty: bool = False  # break the rule: take arrivals in however full the pipeline is
    echo: float = 0.0  # share of results that name a sequence which has ended already


class Worker(Shell):
    """Names those that stop in any order, and now and then somebody who is gone: workers hear of that late."""

    def __init__(self, *args, dice, echo, **options):
        super().__init__(*args, **options)
        self.dice, self.echo = dice, echo

    def _result(self, failing, hashes):
        result = super()._result(failing, hashes)
        self.dice.shuffle(result.stopped)
        if self.ledger.ended and self.dice.random() < self.echo:
            result.stopped.insert(0, Stopped(self.dice.choice(list(self.ledger.ended))))
        return result


class Loop:
    """Plays a script. `saw` counts what happened, so that a test can tell whether it tested anything."""

    def __init__(self, policy, limits, script, log, *, seed=0, keep_snapshots=False):
        self.dice = Random(seed)
        self.shell = Worker(policy, limits, keep_snapshots=keep_snapshots, dice=self.dice, echo=script.echo)
        self.limits, self.script, self.log = limits, script, log
        self.waiting = list(script.arrivals)
        self.aborts = sorted(script.aborts)
        self.results = []  # when each flight is back
        self.until = NEVER
        self.submitted = []
        self.now = -1
        self.saw = dict.fromkeys(("full", "late", "preempted", "cached", "aborted", "failed", "discarded"), 0)

    def run(self, num_turns=NEVER):
        while num_turns and (when := self._next()) < NEVER:
            self._turn(max(when, self.now + 1))
            num_turns -= 1
        return self

    @property
    def is_full(self):
        return len(self.shell.flight) >= self.limits.max_in_flight

    def _next(self):
        times = [self.until, *self.results[:1], *(when for when, _ in self.aborts[:1])]
        if self.waiting and (self.script.hasty or not self.is_full):
            times.append(self.waiting[0].request.arrival_ns)
        return min(times, default=NEVER)

    def _turn(self, now):
        is_back = bool(self.results) and self.results[0] <= now
        aborts = [key for when, key in self.aborts if when <= now]
        self.aborts = [entry for entry in self.aborts if entry[0] > now]
        late = [entry for entry in self.waiting if entry.request.arrival_ns <= now]
        coming = [] if self.is_full and not is_back and not self.script.hasty else late
        for key in aborts:  # an abort finds its request, however full the pipeline is
            if any(entry.request.id == key for entry in late):
                coming = late
        self.saw["full"] += bool(late and not coming)
        self.saw["late"] += any(entry.request.arrival_ns < now for entry in coming)
        self._take(now, coming, aborts, is_back)

    def _take(self, now, coming, aborts, is_back):
        shell = self.shell
        self.waiting = self.waiting[len(coming) :]
        self.submitted += coming
        alive = list(shell.ledger.alive)
        failing = [self.dice.choice(alive)] if is_back and alive and self.dice.random() < self.script.fail else []
        self.saw["failed"] += len(failing)
        self.saw["aborted"] += sum(key in alive for key in aborts)
        if is_back:
            self.results.pop(0)
        first_flight = shell.flight[0][0] if is_back else None
        self.now, shell.now = now, now - 1
        arrivals = [(entry.request, entry.length) for entry in coming]
        turn = shell.turn(*arrivals, aborts=aborts, num_results=int(is_back), failing=failing, hashes=self._hashes())
        results, requests, _, _ = shell.log[-1][0]
        self.log.write(now, results, requests, aborts, turn)
        self._dispatch(now, turn)
        self._count(turn, first_flight)

    def _dispatch(self, now, turn):
        for _ in turn.plans:
            back = max(self.results[-1:] or [now]) + self.dice.choice([1, 5, 40, 200])
            self.results.append(back)
        self.until = turn.wait.until_ns or NEVER

    def _hashes(self):
        alive = self.shell.ledger.alive
        known = {entry.request.id: entry.hashes for entry in self.submitted if entry.hashes}
        return {key: hashes for key, hashes in known.items() if key in alive}

    def _count(self, turn, returned):
        self.saw["preempted"] += sum(type(event) is Preempted for event in turn.events)
        self.saw["cached"] += sum(getattr(event, "num_cached_tokens", 0) > 0 for event in turn.events)
        self.saw["discarded"] += 0 if returned is None else returned.num_discarded


def draw_script(seed, limits, count, *, gap=60, aborts=0.2, fail=0.0, echo=0.0):
    """Requests in bursts, some of which share prefixes, and aborts at any time of their lives."""
    dice, now, script = Random(seed), 1000, Script(fail=fail, echo=echo)
    for key in range(count):
        now += dice.choice([0, 0, 1, gap, 3 * gap])
        request, length, hashes = draw_request(dice, key, now, limits)
        hashes = hashes[: (request.num_prompt_tokens + length) // limits.block_size]
        script.arrivals.append(Coming(request, length, hashes))
        if dice.random() < aborts:
            script.aborts.append((now + dice.choice([0, 1, 100, 1000, 5000]), key))
    return script


def record(folder, policy, limits, script, *, seed=0, keep_snapshots=False, num_turns=NEVER):
    """Play a script and write the folder of the run; returns what happened."""
    folder.mkdir(exist_ok=True)
    with DecisionLog(folder / LOG_NAME) as log:
        loop = Loop(policy, limits, script, log, seed=seed, keep_snapshots=keep_snapshots).run(num_turns)
    config = {"policy": policy, "limits": asdict(limits)}
    (folder / "report.json").write_text(json.dumps({"config": config, "decision_sha256": log.sha256}))
    rows = tuple(row(entry, limits.block_size) for entry in loop.submitted)
    write_trace(Trace(name="run", format="gllm", requests=rows), folder / "trace.jsonl.gz")
    return loop


def row(entry, block_size):
    request = entry.request
    return TraceRequest(
        arrival_ns=request.arrival_ns,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=0,
        hash_ids=entry.hashes or tuple(request.block_hashes),
        hash_block_size=block_size if request.block_hashes or entry.hashes else 0,
        priority=request.priority,
        deadline_ns=request.deadline_ns,
        max_tokens=request.max_tokens,
    )


def rewrite_log(folder, change):
    """Pass the log's turns, as dicts, through `change`, which may return others."""
    path = folder / LOG_NAME
    turns = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    turns = change(turns) or turns
    text = "".join(json.dumps(turn, separators=(",", ":")) + "\n" for turn in turns)
    path.write_bytes(gzip.compress(text.encode()))


def small_limits(depth=2, ahead=0, **changes):
    """A cache so small that it overflows."""
    values = {"num_blocks": 40, "block_size": 4, "max_model_len": 120, "max_num_seqs": 12}
    return Limits(**{**values, "depth": depth, "max_in_flight": depth + ahead, **changes})
