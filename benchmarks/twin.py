"""What the twin is judged by: a profile of this machine, then recorded replays of traffic that the profile never saw.

    python benchmarks/twin.py qwen3-8b --trace azure2023_conv.csv --rates 2,6,12 [--policies throttle sarathi]
        [--seconds 30] [--max-total-tokens N] [--repeats 3] [--pp N] [--tp N] [--no-profile] [--out FOLDER]

Each run takes the requests of so many seconds of traffic at its rate (the trace's own times, faster or slower), in real
time, on an engine of its own. FOLDER gets profile.json and a folder for each run, less its pages. Then, anywhere:

    python -m gllm.sim fidelity FOLDER/*_throttle_6_* --profile FOLDER/profile.json

says how far the simulator is, beside the spread of the repeated runs. A shape's name makes a model with random weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from model_folder import model_folder, model_name
from record import OUT, slug

from gllm.console.errors import CommandError
from gllm.console.options import positive, whole
from gllm.console.parser import Parser, run
from gllm.console.terminal import say
from gllm.runtime.default_model import PATH
from gllm.sim.compare import mean_rate
from gllm.sim.options import rates
from gllm.trace import load_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGES = "report.html", "timeline.json", "requests.csv"  # made again from what is kept


def twin(args: argparse.Namespace) -> int:
    """Profile and replay; return the exit status."""
    pace = mean_rate(load_trace(args.trace))
    if pace is None:
        raise ValueError(f"--trace {args.trace}: its requests come all at once; take one with arrival times")
    args.out.mkdir(parents=True, exist_ok=True)
    layout = [f"--{key}={size}" for key in ("pp", "tp", "ep") if (size := getattr(args, key)) > 1]
    clipped = ["--max-total-tokens", args.max_total_tokens] if args.max_total_tokens else []
    with model_folder(args.model) as folder:
        engine = ["--model", folder, "--max-num-seqs", args.max_num_seqs, *layout]
        if folder != PATH and not any(folder.glob("*.safetensors")):
            engine += ["--load-format", "dummy", "--skip-tokenizer-init"]
        if args.profile:
            steps = ["--max-tokens-per-step", args.max_tokens_per_step] if args.max_tokens_per_step else []
            quick = ["--quick"] if args.quick else []
            command("profile", *engine, *steps, *quick, "--quiet", "--out", args.out / "profile.json")
        for number in range(args.repeats):  # whole rounds, so that a slow drift of the machine shows as spread
            for rate in args.rates:
                for policy in args.policies:
                    name = slug(model_name(folder), *(part.strip("-").replace("=", "") for part in layout), policy)
                    window = f"0:{args.seconds * rate / pace:.3f}"
                    traffic = ["--rate-scale", rate / pace, "--window", window, *clipped]
                    replay(args, [*engine, *traffic, "--policy", policy], args.out / f"{name}_{rate:g}_{number + 1}")
    return 0


def replay(args: argparse.Namespace, options: list[object], out: Path) -> None:
    """One run; its folder without what is made again from the rest."""
    command("replay", args.trace, *options, "--temperature", 0.6, "--quiet", "--json", "--out", out)
    for page in PAGES:
        (out / page).unlink()


def command(name: str, *words: object) -> None:
    """A command of the runtime, to its end.

    Raises:
        CommandError: It failed; what it said went to standard error.
    """
    start = time.monotonic()
    line = [sys.executable, "-m", "gllm.runtime", name, *map(str, words)]
    status = subprocess.run(line, stdout=subprocess.DEVNULL, check=False).returncode  # noqa: S603
    if status:
        raise CommandError(f"{name} ended with status {status}")
    say(f"{Path(str(words[-1])).name}: {time.monotonic() - start:.0f} s")
    sys.stdout.flush()


def parser() -> Parser:
    """The command line."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", nargs="?", help="a folder, or a shape's name; default: gLLM's own small model")
    made.add_argument("--trace", default="chat", metavar="TRACE", help="a sample's name or a file (default: chat)")
    made.add_argument("--rates", type=rates, default=[2.0], metavar="R,...", help="requests/s (default: 2)")
    made.add_argument("--policies", nargs="+", default=["throttle"], metavar="P", help="default: throttle")
    made.add_argument("--seconds", type=positive, default=30.0, metavar="S", help="of traffic in a run (default: 30)")
    made.add_argument("--max-total-tokens", type=whole(1), metavar="N", help="clip each request to so many")
    made.add_argument(
        "--repeats", type=whole(0), default=3, metavar="N", help="of each run (default: 3; 0: only the profile)"
    )
    made.add_argument("--max-num-seqs", type=whole(1), default=512, metavar="N", help="default: 512")
    made.add_argument("--max-tokens-per-step", type=whole(1), metavar="N", help="of the profile; default: the policy's")
    made.add_argument("--no-profile", dest="profile", action="store_false", help="only replay")
    made.add_argument("--quick", action="store_true", help="a profile of few points")
    for key, text in (("pp", "stages"), ("tp", "GPUs a stage"), ("ep", "ranks that share the experts")):
        made.add_argument(f"--{key}", type=whole(1), default=1, metavar="N", help=f"{text} (default: 1)")
    made.add_argument("--out", type=Path, default=OUT / "twin", metavar="FOLDER", help=f"default: {OUT / 'twin'}")
    made.set_defaults(command=twin)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    return run(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
