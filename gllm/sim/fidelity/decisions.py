"""`fidelity --decisions`: whether the simulator's shell, told what a real run was told and when, decides as it did."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gllm.console.output import FIDELITY_FILES, staged
from gllm.console.terminal import say, say_table, warn
from gllm.report.decision_log import LOG_NAME, canonical, read_log
from gllm.sim.diff import Parting, parting_table
from gllm.sim.recorded import simulate_recording
from gllm.sim.recording import read_recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gllm.core import Plan
    from gllm.sim.recorded import Replica
    from gllm.sim.recording import Recording

    Turn = dict[str, Any]

EQUAL, APART = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """How a simulation on a recorded run's times compares with it."""

    run: str
    num_decisions: int
    is_equal: bool
    turn: int | None  # the first that differs, from 1
    differs_in: list[str]
    failure: str | None  # what the simulated engine raised, if it did


_CALLED = {
    "t": "its time",
    "done": "its results",
    "arrived": "its arrivals",
    "aborted": "its aborts",
    "plans": "its plans",
    "wait": "why it waits",
    "until": "until when it waits",
}


def compare_decisions(run: Path, out: str | None) -> int:
    """Print whether a recorded run's decisions are those of a simulation on its times; 0 if they are, else 1."""
    recording = read_recording(run)
    with _folder(out) as folder:
        path = folder / LOG_NAME
        replica = simulate_recording(recording, path)
        number = first_difference(run / LOG_NAME, path)
        _tell(run, recording, replica)
        if number is None:
            return _tell_equal(recording)
        _tell_parting(run, path, number, replica.failure)
    return APART


def inject(run: Path, recording: Recording, watch: Callable[[Plan], object] | None = None) -> Injected:
    """Simulate on a run's recorded times and compare the logs; `watch` is shown each plan."""
    with _folder(None) as folder:
        path = folder / LOG_NAME
        replica = simulate_recording(recording, path, watch)
        number = first_difference(run / LOG_NAME, path)
        turns = None if number is None else (_turn(run / LOG_NAME, number), _turn(path, number))
    return Injected(
        run=str(run),
        num_decisions=recording.num_decisions,
        is_equal=number is None,
        turn=None if number is None else number + 1,
        differs_in=[] if turns is None else _differing(turns),
        failure=replica.failure,
    )


@contextmanager
def _folder(out: str | None) -> Iterator[Path]:
    """Where the simulated log goes: the folder that the user named, else one that vanishes."""
    if out is None:
        with TemporaryDirectory(prefix="gllm-") as name:
            yield Path(name)
    else:
        with staged(Path(out), FIDELITY_FILES) as folder:
            yield folder


def first_difference(recorded: Path, simulated: Path) -> int | None:
    """The first turn whose lines are not the same bytes; None if all are."""
    with gzip.open(recorded) as one, gzip.open(simulated) as other:
        for number, (line, replica) in enumerate(zip_longest(one, other)):
            if line != replica:
                return number
    return None


def _tell(run: Path, recording: Recording, replica: Replica) -> None:
    num_turns = len(recording.moments)
    say(f"{run}: {recording.policy_spec}, {num_turns:,} turns, {recording.num_decisions:,} decisions")
    say(f"recorded  SHA-256 {recording.sha256}")
    cut = f" (of its first {replica.num_turns:,} turns)" if replica.num_turns != num_turns else ""
    say(f"simulated SHA-256 {replica.sha256}{cut}")
    if recording.num_unfinished:
        warn(f"note: the log ends with requests unfinished: {recording.num_unfinished:,}; it is compared up to there")


def _tell_equal(recording: Recording) -> int:
    """Equal, unless the log is not the one that the report speaks of."""
    reported = recording.reported_sha256
    if reported not in (None, recording.sha256):
        say(f"the logs are equal, but the report's decisions have SHA-256 {reported}: it is of another run")
        return APART
    say("equal")
    return EQUAL


def _tell_parting(run: Path, simulated: Path, number: int, failure: str | None) -> None:
    """The first decision that is not the same; where all are, what else of the turn is not."""
    turns = _turn(run / LOG_NAME, number), _turn(simulated, number)
    before = sum(len(turn["plans"]) for turn in islice(read_log(simulated), number))
    parting = _parting(turns, before, canonical)
    differing = ", ".join(_differing(turns))
    if parting is None:
        say(f"all decisions so far are equal, {before:,}; turn {number + 1:,} differs in {differing}")
        parting = _parting(turns, before, json.dumps) or Parting(before, *map(_without_plans, turns))
    else:
        say(f"the runs part at decision {parting.number:,}, in turn {number + 1:,}, which differs in {differing}")
    if failure is not None:
        say(f"the simulated engine failed: {failure}")
    for name, decision, turn in zip(("recorded", "simulated"), parting[1:], turns, strict=True):
        if decision is None:
            say(f"{name}: {'the log has ended' if turn is None else 'no such decision in this turn'}")
    say_table(parting_table([f"{run}\nrecorded", "simulated"], parting))


def _parting(
    turns: tuple[Turn | None, Turn | None], before: int, text: Callable[[dict[str, Any]], str]
) -> Parting | None:
    """The first two decisions of a turn whose texts differ."""
    plans = [[] if turn is None else [{"t": turn["t"], **plan} for plan in turn["plans"]] for turn in turns]
    for index, (one, other) in enumerate(zip_longest(*plans)):
        if one is None or other is None or text(one) != text(other):
            return Parting(before + index, one, other)
    return None


def _differing(turns: tuple[Turn | None, Turn | None]) -> list[str]:
    """Fields of a turn that are not the same, as a user would call them."""
    one, other = (turn or {} for turn in turns)
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return [_CALLED.get(name, name) for name in names] or ["the way it is written"]


def _without_plans(turn: Turn | None) -> Turn | None:
    """What a table shows of a turn whose plans are equal."""
    if turn is None:
        return None
    return {name: value if name == "t" else json.dumps(value) for name, value in turn.items() if name != "plans"}


def _turn(path: Path, number: int) -> Turn | None:
    return next(islice(read_log(path), number, None), None)
