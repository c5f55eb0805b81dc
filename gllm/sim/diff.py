"""`diff`: the first decision in which two runs part, and what each policy saw."""

from __future__ import annotations

import hashlib
import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.console.terminal import say, say_table
from gllm.report.decision_log import canonical, read_decisions

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    Decision = dict[str, Any]

_MANY = 8


class Parting(NamedTuple):
    """Where two logs part; None where one has ended."""

    number: int  # of equal decisions before
    first: Decision | None
    second: Decision | None


def diff(args: Namespace) -> int:
    """Print where two runs part; 0 if nowhere, else 1."""
    paths = [Path(run) for run in args.runs]
    digest = hashlib.sha256()
    number = 0
    for number, pair in enumerate(_pairs(paths), start=1):
        if isinstance(pair, str):
            digest.update(pair.encode())
            continue
        _print(args.runs, [_policy(path) for path in paths], Parting(number - 1, *pair))
        return 1
    say(f"equal: {number:,} decisions, SHA-256 {digest.hexdigest()}")
    return 0


def first_parting(one: Path, other: Path) -> Parting | None:
    """The first decision in which two logs part; None if nowhere."""
    for number, pair in enumerate(_pairs((one, other))):
        if not isinstance(pair, str):
            return Parting(number, *pair)
    return None


def _pairs(paths: Sequence[Path]) -> Iterator[str | tuple[Decision | None, Decision | None]]:
    """For each decision its line where both runs have the same, else both decisions."""
    for one, other in zip_longest(*map(read_decisions, paths)):
        line = None if one is None or other is None else canonical(one)
        yield f"{line}\n" if line is not None and line == canonical(other) else (one, other)


def _policy(path: Path) -> str:
    """The run's policy, if its report says."""
    try:
        return str(json.loads((path / "report.json").read_text(encoding="utf-8"))["config"]["policy"])
    except (OSError, ValueError, KeyError, TypeError):
        return "policy unknown"


def _print(runs: Sequence[str], policies: Sequence[str], parting: Parting) -> None:
    say(f"the runs part at decision {parting.number:,}; the {parting.number:,} before it are equal")
    for run, decision in zip(runs, parting[1:], strict=True):
        if decision is None:
            say(f"{run} ends there: it has no decision {parting.number:,}")
    say_table(parting_table([f"{run}\n{policy}" for run, policy in zip(runs, policies, strict=True)], parting))


def parting_table(heads: Sequence[str], parting: Parting) -> Table:
    """A row a field; a star where the runs differ, the time aside, which may."""
    from rich import box  # noqa: PLC0415 - the command line starts without it
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, caption="* differs; time is no part of a decision")
    for head in ("", *heads):
        table.add_column(escape(head), overflow="fold")
    one, other = (_flat(decision) for decision in parting[1:])
    for name in dict.fromkeys([*one, *other]):
        a, b = one.get(name, ""), other.get(name, "")
        mark = "" if a == b or name == "time" else "*"
        table.add_row(f"{mark}{name}", escape(_shown(a, b)), escape(_shown(b, a)))
    return table


def _flat(decision: Decision | None) -> dict[str, Any]:
    """Fields by what they are called in the table, what the policy saw last."""
    if decision is None:
        return {}
    saw = decision.get("saw", {})
    own = {name: value for name, value in decision.items() if name not in ("t", "saw")}
    seen = {f"saw {name.replace('_', ' ')}": value for name, value in saw.items()}
    return {"time": f"{decision['t'] / 1e9:.9f} s", **own, **seen}


def _shown(value: Any, other: Any) -> str:  # noqa: ANN401 - JSON values
    """A value; of a long list what the other has not, for that is what one looks for."""
    if not isinstance(value, list) or len(value) <= _MANY:
        return json.dumps(value) if not isinstance(value, str) else value
    known = other if isinstance(other, list) else []
    only = [item for item in value if item not in known]
    listed = ", ".join(map(json.dumps, only[:_MANY])) + (", ..." if len(only) > _MANY else "")
    return f"{len(value)} entries" + (f", {len(only)} only here: {listed}" if only else "")
