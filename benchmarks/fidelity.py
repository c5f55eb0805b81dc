"""How far the simulator is from the hardware: every recorded run in results/twin beside its simulation.

    python benchmarks/fidelity.py

A folder there is one run, as `twin.py` records them, named for model, layout, policy, rate and repetition; the
repetitions are one group. Each group is compared as by `python -m gllm.sim fidelity RUN... --profile P`. This needs no
GPU, and the machine does not matter. tests/twin/test_hardware_runs.py fails when an error grows beyond what is written.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common import describe_run, write_results
from record import RESULTS, ROOT, table

from gllm.report.decision_log import LOG_NAME
from gllm.report.metrics import plain
from gllm.sim.constants import RooflineConstants
from gllm.sim.fidelity.compare import compare
from gllm.sim.fidelity.metrics import DEFAULT_BAR
from gllm.sim.fidelity.runs import read_runs, sim_config
from gllm.sim.fidelity.tables import INTERVALS, METRICS, PARTS, STAGES
from gllm.sim.options import DEFAULT_REPLICAS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gllm.sim.fidelity.compare import Comparison
    from gllm.sim.fidelity.runs import RecordedRun

NAME = "twin"
RUNS = RESULTS / NAME
PROFILES = {
    "qwen3-8b_to640": "benchmarks/results/twin/qwen3-8b_to640_h200.json",
    "qwen3-8b_bursts": "benchmarks/results/twin/qwen3-8b_bursts_h200.json",
    "qwen3-8b_settled": "benchmarks/results/twin/qwen3-8b_settled_h200.json",
    "qwen3-8b_two-rests": "benchmarks/results/twin/qwen3-8b_two-rests_h200.json",
    "qwen3-8b_whole-blocks": "benchmarks/results/twin/qwen3-8b_whole-blocks_h200.json",
    "qwen3-8b_one-limit": "benchmarks/results/twin/qwen3-8b_one-limit_h200.json",
    "qwen3-8b_multiples": "benchmarks/results/twin/qwen3-8b_multiples_h200.json",
    "qwen3-8b_stair-ends": "benchmarks/results/twin/qwen3-8b_stair-ends_h200.json",
    "qwen3-8b_stairs": "benchmarks/results/twin/qwen3-8b_stairs_h200.json",
    "qwen3-8b": "qwen3-8b_h200",
    "qwen3-30b-a3b_padded": "benchmarks/results/twin/qwen3-30b-a3b_padded_h200.json",
    "qwen3-30b-a3b_small-tiles": "benchmarks/results/twin/qwen3-30b-a3b_small-tiles_h200.json",
    "qwen3-30b-a3b_cool-attention": "benchmarks/results/twin/qwen3-30b-a3b_cool-attention_h200.json",
    "qwen3-30b-a3b": "qwen3-30b-a3b_h200",
    "qwen3-0.6b_whole-blocks": "benchmarks/results/twin/qwen3-0.6b_whole-blocks_h200.json",
    "qwen3-0.6b_two-rests": "benchmarks/results/twin/qwen3-0.6b_two-rests_h200.json",
    "qwen3-0.6b": "qwen3-0.6b_h200",
    "qwen3-32b_pp2_nccl": "benchmarks/results/twin/qwen3-32b_pp2_nccl_h200.json",
    "qwen3-32b_pp2": "qwen3-32b_pp2_h200",
}
"""How a group's name begins -> its profile: a packaged one, or a file here. The first that fits."""

METRIC_KEYS = ("label", "unit", "measured", "simulated", "error", "spread", "passes", "interval", "is_inside")
STAGE_KEYS = (
    *("stage", "kind", "num_batches", "measured_s", "predicted_s", "error", "absolute_error"),
    *("components_s", "factors"),
)
HEADLINES = ("TTFT mean", "TPOT mean", "E2E mean", "output tokens/s")
BODIES = ("measured", "simulated")
RANKED = {"output tokens/s": True, "TTFT p99": False}
"""What policies are put in order by, and whether more is better."""

METHOD = """\
Runs of gLLM with random weights on the first seconds of Azure's conversation trace of 2023, of its code trace (`code`),
or of Mooncake's conversations, whose prompts have blocks in common (`mooncake`; requests clipped to 8,192 tokens), on
NVIDIA H200 GPUs. A run's name ends with the rate, in requests/s, to which the whole trace is scaled (its start may be
quieter), and with the repetition. Of a run the simulator knows when clients asked and how long the answers were; times
come from the profile.

Errors are simulated less measured, in percent of the measured mean of the repetitions; of a share, in points. The
spread is the largest less the smallest of the repetitions. A metric is within if it is off by at most 2 % (TTFT and
every p99: 4 %) or by twice the spread. Intervals are 90 % prediction intervals, by the profile's own checks.
"""

CAUSES = """\
- Groups `qwen3-8b_to640` are the first three runs, of an earlier build and its own profile: steps of more than 640
  tokens were no CUDA graphs, so that the host decided how long those of 641 to 1,100 took, and the profile's decodes
  attended to equal contexts. The build is f9ebb29 with uncommitted work on profiles and first starts.
- Groups `qwen3-8b_bursts` and `qwen3-32b_pp2_nccl` are of build 17eabda and its profiles: these measured each step in
  short bursts, after which a GPU still has its highest clock, all prompts of the same tokens; and NCCL's receives kept
  multiprocessors busy while they waited, which made the second stage 12 to 30 % slower.
- Groups `qwen3-8b_settled` (5e0443b) and `qwen3-32b_pp2` (f258cbe with GLLM_EDGES=copy, which is the only way since):
  profiles measured large steps with the clock that they leave a GPU. In traffic that comes thinner it has rested: steps
  of 129 to 2,048 tokens of Sarathi at 16/s take 6 to 9 % less. Contexts and places of blocks were less unlike than
  traffic's.
- Groups `qwen3-8b_whole-blocks` and `qwen3-0.6b_whole-blocks` are of b610c9c, all on one machine: profiles hold times
  after a rest and a clock (0.6B has none: it draws too little). Steps of 8B are off by 1.1 to 1.9 % each and by -0.8 to
  +0.4 % in their sum. TTFT beyond saturation is mostly a queue, so it multiplies that.
- Groups `qwen3-8b_one-limit`, with `code` and `mooncake`, are of 10da2a5, all on another machine: the
  chunk kernel's schedule, small batches' new kernels. Steps of 2,048 tokens are 2 % longer than predicted where two
  hundred decodes are among them (Sarathi at 48/s) and 1 to 2.5 % shorter where there are few (code, Mooncake): what
  decodes take beside long chunks, after long heat, is not known well enough. Decodes alone are right to 0.6 %.
- Groups `qwen3-8b_multiples` are of c6ac179, all on a third machine. Its profile's clock has two limits, and what each
  size of step comes to; its steps beyond graphs have multiples of 128 tokens, for which cuBLAS has kernels that are 3
  to 8 % slower than those of other numbers. Throttling makes steps of any number (Mooncake: steps 3 % shorter than
  predicted); Sarathi, whose steps have 2,048, did not mind.
- Groups `qwen3-8b_stair-ends`, with `code` and `mooncake`, are of f5b92fb, all on a fourth machine, with other numbers
  of tokens beyond graphs: the ends of stairs of 128 tokens alone. Just beyond them its checks take 5 to 6 % longer.
- Groups `qwen3-8b_stairs`, with `code` and `mooncake`, are of 58142fc, all on a fifth machine; the profile has both
  ends of stairs. Its checks of 1,300 to 2,050 tokens are off by -1.8 to +0.1 % (a rested GPU), decodes alone by 2 % at
  most. Throttled steps of 1,089 to 2,047 tokens while the GPU is hot are 1.2 to 1.6 % longer than predicted in their
  sum, whatever is in them: what a step draws was measured at the upper ends of stairs, some of which draw less than
  what is between. From the first to the last of three runs at 48/s, some six minutes, the card became 0.5 % slower.
- Groups `qwen3-8b`, with `code` and `mooncake`, are of f35153c, all on another machine; the profile has points halfway
  up stairs, too. What is left are steps of 1,024 to 1,792 tokens at 48/s, 1.0 to 1.4 % longer than predicted, the more
  decodes are in them. Beyond saturation TTFT is a queue and multiplies it.
- Groups `qwen3-30b-a3b_padded` are of e276e3d, all on one machine, the first of a mixture of experts. Padding was
  routed, each row of it to experts of its own, which were then read, and random weights sent all tokens of a prompt to
  the same few experts (a chunk of 512 tokens, of no padding, 11.3 ms; one of 576, padded to 640, 20.5): no table by
  tokens holds that. Steps of 513 to 1,152 tokens come out 0 to 22 % too long, those of up to 256 are off by -9 to
  +21 %; sums agree to 2.5 %. Both were mended in f35153c.
- Groups `qwen3-30b-a3b_small-tiles` are of 23f197c with the tiles of before, all on one machine: graphs are measured
  with the fewest tokens that they are replayed for, too. Steps of 1,025 to 1,536 tokens are 1 to 4 % longer than
  predicted: an expert has 64 to 96 of them in the mean, and its blocks held 64, so that what a step takes follows how
  evenly they are spread. In `qwen3-30b-a3b_cool-attention` (23f197c, all on another machine) blocks hold 128 from there
  on: steps of 1,280 to 1,536 tokens take 15 % less (1,024: 5 %, most others 2 %: the machine) and are 1.6 to 2.3 %
  longer than predicted: by its clock decodes' attention draws nothing. In `qwen3-30b-a3b` (f4240b1, all on one machine)
  the clock is fitted to prompts beside many decodes, too, and it draws half of what products may.
- Groups `qwen3-0.6b` are of f4240b1, all on one machine. Its profile's clock is taken out: it brought the series that
  it was fitted to no nearer (0.67 %; 0.65 without), and made steps at 60/s 1.6 % too long, where the GPU keeps its
  clock. `profile` leaves such a clock out since. What is left grows with a step's prompt tokens where decodes are among
  them, some 0.1 ms for 1,024 and 0.15 to 0.2 for 2,048, at 60/s, too. Half of it may be reading their queries, keys
  and values (8 KB a token and layer), which decodes' keys have driven out of the L2 cache; beyond saturation heat adds
  to it.
- Groups `qwen3-0.6b_two-rests` and `qwen3-8b_two-rests` are of 4f403a2, on another machine: left-over blocks are cut,
  and chunks attended before decodes (taken back: their answers were wrong, which no time depends on). The profiles were
  made with two short rests for a step instead of three: 0.6B's hardly mind; of 8B steps of 1,024 to 1,152 tokens came
  out 4 to 6 % too long, what chunks take beyond them too short, and the clock saw no heat in decodes. Beside
  `qwen3-8b_whole-blocks_h200`, the other machine's, the same run is at throughput +2.0, TPOT -2.7 and TTFT -7.1 %.
- In these older groups mixed steps of 0.6B take 1 to 3 % more than predicted, some 5 us a layer where they have more
  than 512 tokens; with the schedule of the chunk kernel, which `qwen3-0.6b_two-rests_h200` has, a quarter is gone.
"""


def groups() -> dict[str, list[Path]]:
    """Folders of runs by their name less the repetition, in order."""
    found = defaultdict(list)
    for folder in sorted(path for path in RUNS.iterdir() if path.is_dir()):
        found[folder.name.rpartition("_")[0]].append(folder)
    return dict(found)


def profile_of(group: str) -> str:
    """As `--profile` names it, seen from the root.

    Raises:
        ValueError: None is known.
    """
    for start, profile in PROFILES.items():
        if group.startswith(f"{start}_"):
            return profile
    raise ValueError(
        f"{RUNS / group}: no profile is known for these runs; add theirs to PROFILES in {Path(__file__).name}"
    )


def compared(group: str, folders: Sequence[Path], *, num_replicas: int = 0, num_processes: int = 1) -> Comparison:
    """A group's runs beside their simulation; without replicas there are no prediction intervals."""
    runs, profile = read_runs([str(folder) for folder in folders]), profile_of(group)
    if profile.endswith(".json"):
        profile = str(ROOT / profile)
    setup = sim_config(runs[0], gpu=None, profile=profile, constants=RooflineConstants()).resolve()
    with TemporaryDirectory(prefix="gllm-") as name:
        path = Path(name, LOG_NAME)
        return compare(runs, setup, path, bar=DEFAULT_BAR, num_replicas=num_replicas, num_processes=num_processes)


def to_json(group: str, found: Comparison) -> dict[str, Any]:
    """What is kept of a group."""
    every = found.to_json()
    num_inside, num_known = found.num_inside
    kept: dict[str, Any] = plain(
        {
            "profile": profile_of(group),
            "cost_model": found.cost["cost_model"],
            **{key: every[key] for key in ("model", "gpus", "policy")},
            "num_runs": len(found.runs),
            "decisions": [decisions(run, found) for run in found.runs],
            "num_inside": num_inside,
            "num_intervals": num_known,
            "metrics": [{key: row[key] for key in METRIC_KEYS} for row in every["metrics"]],
            "stages": [{key: row[key] for key in STAGE_KEYS} for row in every["stages"]],
        }
    )
    return kept


def decisions(run: RecordedRun, found: Comparison) -> dict[str, Any]:
    """Whether a simulation on the run's recorded times decided as it did."""
    replica = next(each for each in found.injected if each.run == str(run.folder))
    return {"run": run.folder.name, "num_decisions": replica.num_decisions, "is_equal": replica.is_equal}


def rankings(kept: dict[str, dict[str, Any]], found: dict[str, Comparison]) -> list[dict[str, Any]]:
    """Where several policies had the same traffic on the same GPUs: their order, the best first, in both bodies."""
    rivals: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, comparison in found.items():
        config, group = comparison.runs[0].record.config, kept[name]
        trace = tuple(config["trace"][key] for key in ("name", "rate_scale", "window"))
        shared = rivals[config["model"], config["gpus"], group["profile"], *trace]
        if group["policy"] in shared:
            raise ValueError(
                f"{RUNS / name}: {group['policy']} had this traffic before; one group a policy is compared"
            )
        shared[group["policy"]] = group
    return [_order(groups, label) for groups in rivals.values() if len(groups) > 1 for label in RANKED]


def _order(groups: dict[str, dict[str, Any]], label: str) -> dict[str, Any]:
    metrics = {policy: _metric(group, label) for policy, group in groups.items()}
    orders = {body: sorted(metrics, key=lambda policy: metrics[policy][body], reverse=RANKED[label]) for body in BODIES}
    measured = [metrics[policy]["measured"] for policy in orders["measured"]]
    is_close = all(abs(one - other) <= DEFAULT_BAR / 100 * one for one, other in pairwise(measured))
    first = next(iter(groups.values()))
    values = {policy: {body: metric[body] for body in BODIES} for policy, metric in metrics.items()}
    verdict = "yes" if orders["measured"] == orders["simulated"] else "measured too close" if is_close else "NO"
    return {"model": first["model"], "gpus": first["gpus"], "by": label, "values": values, **orders, "same": verdict}


def _metric(group: dict[str, Any], label: str) -> dict[str, Any]:
    return next(metric for metric in group["metrics"] if metric["label"] == label)


def _ranking_cells(order: dict[str, Any]) -> list[str]:
    shown = (", ".join(f"{policy} {order['values'][policy][body]:,.4g}" for policy in order[body]) for body in BODIES)
    return [f"{order['model']}, {order['gpus']}", order["by"], *shown, order["same"]]


def report(
    kept: dict[str, dict[str, Any]], found: dict[str, Comparison], orders: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """The page: all groups, all runs, then each group's metrics and stages."""
    yield METHOD
    yield from table(
        ["group", "model", "policy", "profile", "runs", "equal decisions", *HEADLINES, "inside"],
        (_group_cells(name, group) for name, group in kept.items()),
    )
    yield from ["", "## What the errors come from", "", CAUSES, "## Runs", ""]
    head = ["run", "requests", "duration, s", "output tokens/s", "TTFT mean, s", "TPOT mean, ms"]
    rows = (_run_cells(run, comparison) for comparison in found.values() for run in comparison.runs)
    yield from table([*head, "decisions on recorded times"], rows)
    yield from ["", "## Which policy is better", ""]
    yield from [
        f"Policies that had the same traffic, the best first; closer than {DEFAULT_BAR:g} % runs do not tell.",
        "",
    ]
    yield from table(["model", "by", "measured", "simulated", "same order"], map(_ranking_cells, orders))
    for name, comparison in found.items():
        metrics = [(*metric.cells(), *metric.interval_cells()[3:]) for metric in comparison.metrics]
        yield from ["", f"## {name}", ""]
        yield from table([*METRICS.head, *INTERVALS.head[3:]], metrics)
        yield from ["", f"{STAGES.title} ({comparison.runs[0].folder.name}); {STAGES.note}:", ""]
        yield from table(STAGES.head, STAGES.rows(comparison))
        yield from ["", f"{PARTS.title}; {PARTS.note}:", ""]
        yield from table(PARTS.head, PARTS.rows(comparison))


def _group_cells(name: str, group: dict[str, Any]) -> list[str]:
    equal, num_runs = [run["is_equal"] for run in group["decisions"]].count(True), group["num_runs"]
    errors = {metric["label"]: metric["error"] for metric in group["metrics"]}
    profile = Path(group["profile"]).name.removesuffix(".json")
    return [
        *(name, f"{group['model']}, {group['gpus']}", group["policy"], profile),
        *(str(num_runs), f"{equal} of {num_runs}"),
        *(f"{errors[label]:+.2f} %" for label in HEADLINES),
        f"{group['num_inside']} of {group['num_intervals']}",
    ]


def _run_cells(run: RecordedRun, found: Comparison) -> list[str]:
    summary, replica = run.summary, decisions(run, found)
    return [
        *(run.folder.name, f"{summary['num_requests']:,}", f"{summary['duration_s']:.1f}"),
        *(f"{summary['output_tokens_per_s']:,.0f}", f"{summary['ttft_s']['mean']:.3f}"),
        f"{1000 * summary['tpot_s']['mean']:.2f}",
        f"{replica['num_decisions']:,}, {'equal' if replica['is_equal'] else 'NOT EQUAL'}",
    ]


def main() -> None:
    """Compare all runs and write the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    num_processes = os.cpu_count() or 1
    found = {
        name: compared(name, folders, num_replicas=DEFAULT_REPLICAS, num_processes=num_processes)
        for name, folders in groups().items()
    }
    kept = {name: to_json(name, comparison) for name, comparison in found.items()}
    orders = rankings(kept, found)
    values = {**describe_run(), "rankings": orders, "groups": kept}
    write_results(NAME, values, "The twin beside the hardware", report(kept, found, orders))


if __name__ == "__main__":
    main()
