"""`python -m gllm.sim`: replay, compare, diff, fidelity, and lists of what is known.

Only argparse is imported until a command runs, so that --help is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.options import add_engine_options, add_slo_options, add_trace_options, positive, whole
from gllm.console.parser import Parser, add_command, add_output, run
from gllm.sim.options import DEFAULT_REPLICAS, LEAST_REPLICAS, add_jobs, add_model_options, rates

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from gllm.console.parser import Commands


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gllm.sim`; returns the exit status."""
    parser = Parser(prog="python -m gllm.sim", description="Simulate how a trace would be served.", allow_abbrev=False)
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
    return run(parser, argv)


def add_commands(commands: Commands) -> None:
    """The simulator's commands; `gllm` has them too."""
    _add_replay(commands)
    _add_compare(commands)
    diff = add_command(commands, "diff", "gllm.sim.diff", "diff", "name the first decision in which two runs part")
    diff.add_argument("runs", nargs=2, metavar="RUN", help="a folder that replay wrote")
    _add_fidelity(commands)
    for name, text in (
        ("traces", "list the sample traces and the formats of others"),
        ("models", "list the models known by name"),
        ("gpus", "list the GPUs known by name"),
        ("profiles", "list the profiles that come with gLLM: times measured on GPUs"),
        ("policies", "list the policies, their options and the waiting orders"),
    ):
        add_command(commands, name, "gllm.sim.listing", name, text)


def _add_replay(commands: Commands) -> None:
    parser = add_command(commands, "replay", "gllm.sim.replay", "replay", "replay a trace and report how it was served")
    add_trace_options(parser)
    parser.add_argument("--policy", default="throttle", metavar="P", help="NAME[:key=value,...]; see policies")
    add_model_options(parser)
    add_engine_options(parser)
    add_slo_options(parser)
    add_output(parser, "report.html, report.json, requests.csv, record.npz, timeline.json and iterations.jsonl.gz")
    parser.add_argument(
        "--no-iterations", dest="iterations", action="store_false", help="neither log nor hash the decisions: faster"
    )
    group = parser.add_argument_group("prediction intervals")
    text = "also say where each measure is expected in 9 of 10 cases: by more runs, off as the profile's own checks are"
    group.add_argument("--intervals", action="store_const", const=DEFAULT_REPLICAS, help=text)
    text = f"the same by so many more runs (--intervals: {DEFAULT_REPLICAS}); they are drawn with --seed"
    group.add_argument("--replicas", type=whole(LEAST_REPLICAS), metavar="N", help=text)
    add_jobs(group, "of these runs")


def _add_compare(commands: Commands) -> None:
    parser = add_command(
        commands, "compare", "gllm.sim.compare", "compare", "set policies side by side, at one or more rates"
    )
    add_trace_options(parser)
    parser.add_argument(
        "--policies",
        action="extend",
        nargs="+",
        required=True,
        metavar="P",
        help="such as throttle,sarathi:token_budget=512",
    )
    parser.add_argument("--rates", type=rates, metavar="R,...", help="requests/s, reached by scaling the arrival times")
    add_jobs(parser, "runs")
    add_model_options(parser)
    add_engine_options(parser)
    add_slo_options(parser)
    add_output(parser, "compare.html, compare.json, compare.csv and the report of each run")
    parser.add_argument("--iterations", action="store_true", help="log the decisions of each run")


def _add_fidelity(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fidelity",
        "gllm.sim.fidelity.command",
        "fidelity",
        "say how far the simulator is from a recorded run",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a folder that the runtime's replay wrote; repetitions of it tell the noise",
    )
    parser.add_argument(
        "--decisions",
        action="store_true",
        help="feed the run's times to the simulator and compare the decision logs only",
    )
    group = parser.add_argument_group("cost model")
    group.add_argument("--gpu", help="see gpus (default: the run's)")
    group.add_argument(
        "--profile",
        default="auto",
        metavar="FILE|auto|none",
        help="as of replay: a profile, or a roofline (default: auto)",
    )
    group.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="constants of the roofline; then auto is none",
    )
    group = parser.add_argument_group("prediction intervals, where a profile has checks")
    text = f"do without them, which saves {DEFAULT_REPLICAS} more simulations"
    group.add_argument(
        "--no-intervals", dest="intervals", action="store_const", const=0, default=DEFAULT_REPLICAS, help=text
    )
    add_jobs(group, "of these simulations")
    _add_verdict(parser)
    add_output(parser, "fidelity.html, fidelity.json, timeline.json and the simulated iterations.jsonl.gz")


def _add_verdict(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("verdict")
    group.add_argument(
        "--bar",
        type=positive,
        default=2.0,
        metavar="PERCENT",
        help="how far a metric may be off; p99 and TTFT twice as far, noise twice its spread (default: 2)",
    )
    group.add_argument(
        "--check", action="store_true", help="exit status 1 where a metric or a decision is not as it must"
    )
