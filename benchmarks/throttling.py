"""Token throttling against Sarathi on saturated Azure conversation traffic: the paper's ablation in one command.

    python benchmarks/throttling.py [--trace PATH] [--rates 6,12,24,48]

Runs `python -m gllm.sim compare` and keeps its table; the pages stay in out/throttling/. Everything is virtual
time, so the machine does not matter; the times are those of a profile measured on two H200s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from common import describe_run, pick_trace, write_results
from record import ROOT, table

POLICIES = {
    "throttle": "WT + UT, decodes split",
    "throttle:ut=false": "WT only",
    "throttle:wt=false": "UT only",
    "throttle:wt=false,ut=false": "decode split alone",
    "sarathi": "Sarathi, budget 2048",
}
CONFIG = ["--model", "qwen3-32b", "--pp", "4", "--max-num-seqs", "1024", "--profile", "qwen3-32b_pp2_h200"]
MEASURES = {
    "output_tokens_per_s": ("output tokens/s", 1, ",.0f"),
    "bubble_fraction": ("bubbles, %", 100, ".1f"),
    "ttft_s": ("TTFT mean, s", 1, ".3g"),
    "tpot_s": ("TPOT mean, ms", 1000, ".0f"),
    "e2e_s": ("E2E mean, s", 1, ".3g"),
    "tokens_per_batch": ("tokens/batch, std", 1, ".0f"),
}


def run(trace: str, rates: str) -> list[dict[str, Any]]:
    """Compare all policies at all rates; the summaries."""
    folder = ROOT / "out" / "throttling"
    command = [sys.executable, "-m", "gllm.sim", "compare", trace, *CONFIG, "--policies", ",".join(POLICIES)]
    done = subprocess.run([*command, "--rates", rates, "--out", str(folder)], check=False)  # noqa: S603
    if done.returncode:  # which it has told why
        raise SystemExit(done.returncode)
    summaries: list[dict[str, Any]] = json.loads((folder / "compare.json").read_text())["runs"]
    return summaries


def cell(summary: dict[str, Any], measure: str) -> str:
    """One figure of the table."""
    _, factor, form = MEASURES[measure]
    value = summary[measure]
    if isinstance(value, dict):
        value = value["std" if measure == "tokens_per_batch" else "mean"]
    return f"{value * factor:{form}}"


def report(summaries: list[dict[str, Any]]) -> list[str]:
    """A table for each rate."""
    lines = [f"Simulated: `{' '.join(CONFIG)}`."]
    for rate in sorted({summary["rate_per_s"] for summary in summaries}):
        rows = [
            [f"`{s['policy']}`", POLICIES[s["policy"]], *(cell(s, measure) for measure in MEASURES)]
            for s in summaries
            if s["rate_per_s"] == rate
        ]
        lines += ["", f"## {rate:g} requests/s offered", ""]
        lines += table(["policy", "parts", *(name for name, _, _ in MEASURES.values())], rows)
    return lines


def main() -> None:
    """Run the comparison and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="PATH", help="default: azure2023_conv, else a sample")
    parser.add_argument("--rates", default="6,12,24,48", metavar="N,N")
    options = parser.parse_args()
    summaries = run(pick_trace(options.trace), options.rates)
    kept = [{key: summary[key] for key in ("policy", "rate_per_s", *MEASURES)} for summary in summaries]
    write_results("throttling", {**describe_run(), "runs": kept}, "Token throttling and its parts", report(summaries))


if __name__ == "__main__":
    main()
