"""`fidelity`: compare, write, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gllm.console.output import FIDELITY_FILES, staged
from gllm.console.runs import tell
from gllm.console.terminal import say, say_json
from gllm.report.decision_log import LOG_NAME
from gllm.sim.fidelity.decisions import compare_decisions
from gllm.sim.options import cost_constants, num_jobs

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from gllm.sim.fidelity.compare import Comparison

PASSED, FAILED = 0, 1


def fidelity(args: Namespace) -> int:
    """Print how the simulator compares with recorded runs; 1 if it is not as asked, else 0."""
    if args.decisions:
        if len(args.runs) > 1 or args.json:
            raise ValueError("fidelity: --decisions takes one RUN and prints no JSON")
        return compare_decisions(Path(args.runs[0]), args.out)
    found = _found(args)
    tell(args, _notes(found))
    if args.json:
        say_json(found.to_json())
    else:
        _show(found, args.out)
    return PASSED if found.passes or not args.check else FAILED


def _found(args: Namespace) -> Comparison:
    from gllm.sim.fidelity.compare import compare  # noqa: PLC0415 - not for --decisions
    from gllm.sim.fidelity.runs import read_runs, sim_config  # noqa: PLC0415

    runs = read_runs(args.runs)
    config = sim_config(runs[0], gpu=args.gpu, profile=args.profile, constants=cost_constants(args.cost))
    setup = config.resolve()
    compared = partial(
        compare,
        runs,
        setup,
        bar=args.bar,
        num_replicas=args.intervals,
        num_processes=num_jobs(args),
        quiet=args.quiet,
    )
    if args.out is None:
        with TemporaryDirectory(prefix="gllm-") as name:
            return compared(log_path=Path(name) / LOG_NAME)
    with staged(Path(args.out), FIDELITY_FILES) as folder:
        found = compared(log_path=folder / LOG_NAME)
        _write(found, folder)
    return found


def _write(found: Comparison, folder: Path) -> None:
    from gllm.report.files import replacing  # noqa: PLC0415
    from gllm.report.timeline import write_twin_timeline  # noqa: PLC0415
    from gllm.report.write import write_json  # noqa: PLC0415 - plots, which only now are needed
    from gllm.sim.fidelity.page import fidelity_page  # noqa: PLC0415

    write_json(folder / "fidelity.json", found.to_json())
    with replacing(folder / "fidelity.html") as file:
        file.write(fidelity_page(found))
    with replacing(folder / "timeline.json") as file:
        write_twin_timeline(file, {"measured": found.runs[0].record, "simulated": found.record})


def _show(found: Comparison, out: str | None) -> None:
    from gllm.console.terminal import say_table  # noqa: PLC0415
    from gllm.sim.fidelity.tables import STAGE_TABLES, metric_tables, summary_lines, terminal_table  # noqa: PLC0415

    for line in summary_lines(found):
        say(line)
    for table in (*metric_tables(found), *STAGE_TABLES):
        say_table(terminal_table(table, found))
    if out is not None:
        say(f"report {Path(out) / 'fidelity.html'}")


def _notes(found: Comparison) -> Iterator[str]:
    yield from found.cost.get("profile_notes", ())
    blocks = [run.recording.limits.num_blocks for run in found.runs]
    if len(set(blocks)) > 1:
        counts = ", ".join(f"{count:,}" for count in blocks)
        yield f"the runs had caches of {counts} blocks; the simulation has the first one's"
