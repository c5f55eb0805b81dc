"""How a GPU's clock follows what it computes: steps in patterns, and how near a `GpuClock` comes to their times.

    python benchmarks/clock.py qwen3-8b [--out FOLDER]
    python benchmarks/clock.py --read benchmarks/results/clock-patterns_qwen3-8b_nvidia-h200.json

Each pattern begins after a rest: prompts in a row, then decodes; prompts one by one among decodes; decodes alone. What
a step of each kind takes after a rest is measured apart, as `profile` does. The clock is fitted to the patterns that
`profile` has too, and judged by all of them. Writes clock-patterns_MODEL_GPU.json and .svg; --read tells of such a
file again, and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from record import OUT, RUNTIME_PACKAGES, describe_run, show_table, slug, write_json

from gllm.console.parser import Parser
from gllm.console.terminal import say
from gllm.runtime.profile.clock import make_kind
from gllm.runtime.profile.clock_fit import Step, errors, fit
from gllm.runtime.profile.steps import MAX_REPEATS, Mix, StepMaker, chunks, decodes, prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gllm.gpu_clock import GpuClock
    from gllm.runtime.profile.clock_fit import Kind
    from gllm.runtime.profile.session import Session

CHUNK, SHORT, LONG = 64, 16, 1000
FEW, MANY = f"16 decodes of {LONG}", f"256 decodes of {LONG}"
LATE = 8192
BUSY = "1024 tokens beside 256 decodes"
REST_S, SECONDS, STEADY_SECONDS = 0.4, 0.8, 3.0
UNEVEN = (1280, 1536, 1664, 1792)
"""Tokens between the powers of two: whole waves of products, a little more, and a lot."""
LARGEST, TURN = 2048, 9
ALONE = tuple(f"{num} tokens" for num in (128, 256, 512, 1024, *UNEVEN, LARGEST))
SHORT_DECODES = tuple(f"{num} decodes of {SHORT}" for num in (256, 512))
HEATED = ("512 tokens", f"{LARGEST} tokens")
DRAWN = ("25 x 1024 tokens", "12 x 2048 tokens, 27 x 256 tokens", "9 x 1024 tokens beside 64", "8 x 1024 tokens")
PREPARED = 64
"""Tokens of steps that give decodes their caches: a row for each."""

HEAD_NS = 2_000_000
"""What stands between steps is the head; or more, and then there was nothing to do."""


class Pattern(NamedTuple):
    """Kinds of steps and how often each comes in a row; over and over for some time."""

    parts: Sequence[tuple[str, int]]
    seconds: float = SECONDS

    @property
    def name(self) -> str:
        """As the table has it."""
        return ", ".join(f"{times} x {kind}" for kind, times in self.parts)

    @property
    def is_fitted(self) -> bool:
        """Whether the clock is fitted to it, which is what `profile` plays, too."""
        (first, times), *rest = self.parts
        if self.seconds == STEADY_SECONDS:
            return first in HEATED and self.parts[1:] in ([], [(FEW, TURN)])
        if times < MAX_REPEATS or [kind for kind, _ in rest] not in ([], [FEW]):
            return False
        others = {MANY, SHORT_DECODES[0], BUSY, f"{LARGEST} tokens after {LATE}"}
        return first in ALONE or (not rest and first in others)


def kinds() -> dict[str, Mix]:
    """Every kind of step by its name."""
    found = {name: prompts(int(name.split()[0]), CHUNK) for name in ALONE}
    found |= {f"{num} decodes of {LONG}": decodes(num, LONG) for num in (16, 64, 256, 512)}
    found |= {name: decodes(int(name.split()[0]), SHORT) for name in SHORT_DECODES}
    found |= {f"{num} tokens after {LATE}": chunks(1, LATE, num) for num in (512, LARGEST)}
    for num, beside in ((128, 64), (1024, 64), (1024, 256), (2048, 256)):
        found[f"{num} tokens beside {beside} decodes"] = replace(prompts(num, CHUNK), contexts=(LONG,) * beside)
    return found


def patterns() -> list[Pattern]:
    """What is played, in this order."""
    in_a_row = [Pattern([(kind, MAX_REPEATS)]) for kind in kinds() if kind != FEW]
    cooling = [Pattern([(f"{num} tokens", 25 * 1024 // num), (FEW, 45)], 2.0) for num in (512, 1024, 2048)]
    others = (f"64 decodes of {LONG}", f"256 decodes of {SHORT}", MANY, "128 tokens", "256 tokens", "512 tokens")
    cooling += [Pattern([("2048 tokens", 12), (kind, 27)], 2.0) for kind in others]
    pairs = ((256, 1), (256, 3), (512, 2), (512, 5), (1024, 2), (1024, 5), (2048, 5), (2048, 10), (2048, 20))
    among = [Pattern([(FEW, times), (f"{num} tokens", 1)]) for num, times in pairs]
    among += [Pattern([(MANY, times), (f"{num} tokens", 1)]) for num, times in ((512, 1), (1024, 1), (2048, 2))]
    steady = [f"{num} tokens" for num in (256, 512, 1024, *UNEVEN, LARGEST)] + ["2048 tokens beside 256 decodes"]
    steady += ["128 tokens beside 64 decodes", *(f"{num} tokens after {LATE}" for num in (512, 2048))]
    steadily = [Pattern([(kind, MAX_REPEATS - 1)], STEADY_SECONDS) for kind in steady]  # none that the fit has
    steadily += [Pattern([(f"{LARGEST} tokens", 4), (FEW, times)], STEADY_SECONDS) for times in (TURN, 27, 54)]
    return [*in_a_row, *cooling, *among, *steadily]


def measure(folder: Path) -> dict[str, Any]:
    """Kinds and patterns of a model, as the file has them."""
    from gllm.runtime.config import RuntimeConfig  # noqa: PLC0415 - whoever reads a file needs none of it
    from gllm.runtime.profile.command import room, started_workers  # noqa: PLC0415
    from gllm.runtime.profile.grids import make_grid  # noqa: PLC0415
    from gllm.runtime.profile.measure import measure as measure_mix  # noqa: PLC0415
    from gllm.runtime.profile.profiler import fill  # noqa: PLC0415
    from gllm.runtime.profile.session import Session  # noqa: PLC0415

    config = RuntimeConfig(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_num_seqs=512, record=""
    )
    model = config.check()
    with started_workers(config) as workers:
        limits, device = workers.load(say)
        grid = make_grid(room(config, model.shape, limits, device))
        session = Session(workers, num_stages=1, max_in_flight=2)
        maker = StepMaker(limits, model.shape.vocab_size, max_tokens=grid.room.max_tokens, first_plan=0)
        fill(session, maker, grid.room)
        mixes = {name: mix for name, mix in kinds().items() if grid.room.fits(mix)}
        found: dict[str, Any] = {"gpu": device, "kinds": {}, "patterns": []}
        for name, mix in mixes.items():
            session.rest(REST_S)  # small steps do not by themselves
            fresh = sum(num for _, num in mix.chunks)
            alone = prompts(fresh, CHUNK) if fresh else decodes(len(mix.contexts), SHORT)
            layers_ns, base_ns = (measure_mix(session, maker, each, rests=True).layers_ns for each in (mix, alone))
            if mix.chunks and mix.contexts:  # its base has as many tokens, not only those of its chunks
                base_ns = layers_ns - attention_ns(found["kinds"], len(mix.contexts))
            found["kinds"][name] = {"num_tokens": mix.num_tokens, "base_ns": base_ns, "layers_ns": layers_ns}
        for pattern in patterns():
            if not {kind for kind, _ in pattern.parts} <= mixes.keys():
                continue
            session.rest(REST_S)
            rows = list(played(session, maker, mixes, pattern))
            found["patterns"].append({"name": pattern.name, "steps": rows})
            say(f"{pattern.name}: {len(rows)} steps")
    return found


def attention_ns(known: Mapping[str, Mapping[str, int]], num: int) -> int:
    """Of so many decodes with long contexts."""
    kind = known[f"{num} decodes of {LONG}"]
    return kind["layers_ns"] - kind["base_ns"]


def played(
    session: Session, maker: StepMaker, mixes: Mapping[str, Mix], pattern: Pattern
) -> Iterator[tuple[str | None, int, int]]:
    """Kind (None: a preparation), start and duration of the layers of each step, ns."""
    first_ns, end_ns = None, 0
    while first_ns is None or end_ns < first_ns + pattern.seconds * 1e9:
        steps, names = [], []
        for kind, times in pattern.parts:
            for at in range(0, times, MAX_REPEATS):
                before, some = maker.make(mixes[kind], min(MAX_REPEATS, times - at))
                steps += before + some
                names += [None] * len(before) + [kind] * len(some)
        for name, (stamps,) in zip(names, session.run(steps), strict=True):
            first_ns, end_ns = stamps.start_ns if first_ns is None else first_ns, stamps.end_ns
            yield name, stamps.start_ns - first_ns, stamps.head_ns - stamps.start_ns


def series_of(found: Mapping[str, Any]) -> list[list[Step]]:
    """The patterns of a file as the fit takes them."""
    prompts_alone = [kind for name, kind in found["kinds"].items() if "decodes" not in name]
    best_rate = max(kind["num_tokens"] / kind["layers_ns"] for kind in prompts_alone)
    known = {name: kind_of(name, kind, best_rate) for name, kind in found["kinds"].items()}
    series = []
    for pattern in found["patterns"]:
        steps, last_ns = [], 0
        for name, start_ns, took_ns in pattern["steps"]:
            what = known[name] if name else make_kind(PREPARED, took_ns, took_ns, best_rate, has_chunks=True)
            idle_ns = start_ns - last_ns if start_ns > last_ns + HEAD_NS else 0
            steps.append(Step(what, idle_ns, took_ns, counts=name is not None))
            last_ns = start_ns + took_ns
        series.append(steps)
    return series


def kind_of(name: str, kind: Mapping[str, int], best_rate: float) -> Kind:
    """One of a file, as the fit takes it; beside decodes chunks attend to nothing before them."""
    has_chunks, has_decodes, layers_ns = "tokens" in name, "decodes" in name, kind["layers_ns"]
    base_ns = layers_ns if name in {*ALONE, *SHORT_DECODES} else kind["base_ns"]  # the same, measured twice
    holds = {"has_chunks": has_chunks, "has_decodes": has_decodes}
    return make_kind(kind["num_tokens"], base_ns, layers_ns, best_rate, **holds)


def judge(found: Mapping[str, Any]) -> tuple[GpuClock | None, list[list[str]], dict[str, float]]:
    """The clock that fits, a row for each pattern, and the mean absolute error by what was and was not fitted."""
    series = series_of(found)
    names = {pattern.name for pattern in patterns() if pattern.is_fitted}
    is_fitted = [pattern["name"] in names for pattern in found["patterns"]]
    best = fit([steps for steps, fitted in zip(series, is_fitted, strict=True) if fitted])
    if best is None:
        return None, [], {}
    clock = best.clock
    rows, means = [], defaultdict(list)
    for pattern, fitted, steps in zip(found["patterns"], is_fitted, series, strict=True):
        which, figures = "fitted" if fitted else "unseen", []
        for name, each in (("without", replace(clock, limits=())), ("with", clock)):
            off = errors(each, [steps])
            means[f"{which}, {name}"].append(fmean(map(abs, off)))
            figures += [f"{100 * fmean(off):+.2f}", f"{100 * fmean(map(abs, off)):.2f}"]
        rows.append([pattern["name"], which, str(len(errors(clock, [steps]))), *figures])
    return clock, rows, {name: fmean(values) for name, values in means.items()}


def ratios(clock: GpuClock, steps: Sequence[Step]) -> list[float]:
    """How much longer than rested ones steps that count take by this clock, as multiples."""
    counted = [step.took_ns / step.kind.rested_ns for step in steps if step.counts]
    return [(1.0 + off) * took for off, took in zip(errors(clock, [steps]), counted, strict=True)]


def draw(found: Mapping[str, Any], clock: GpuClock, path: Path) -> None:
    """A picture of some patterns: what steps took, and what the clock says, by the time of the pattern."""
    import matplotlib as mpl  # noqa: PLC0415 - only here

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "clock"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    pairs = zip(found["patterns"], series_of(found), strict=True)
    shown = [(pattern, steps) for pattern, steps in pairs if pattern["name"].startswith(DRAWN)]
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 2.1 * len(shown)), layout="constrained", squeeze=False)
    for (pattern, steps), axis in zip(shown, axes[:, 0], strict=True):
        at = [start_ns / 1e6 for name, start_ns, _ in pattern["steps"] if name]
        took = [step.took_ns / step.kind.rested_ns for step in steps if step.counts]
        axis.plot(at, took, ".", ms=4, color="tab:blue", label="measured")
        axis.plot(at, ratios(clock, steps), lw=1, color="tab:red", label="by the fitted clock")
        axis.set(title=pattern["name"], ylabel="of a rested step", xlim=(0, max(at[-1], 1000)), ylim=(0.97, 1.3))
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set(xlabel="ms")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Measure or read, print and write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen3-8b", help="a folder with config.json, or a shape's name")
    parser.add_argument("--read", type=Path, metavar="FILE", help="tell of this file instead of measuring")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the result (default: {OUT})")
    args = parser.parse_args()
    try:
        found = read(args.read) if args.read else measured(args.model)
    except ValueError as error:
        parser.error(str(error))
    path = args.out / f"{slug('clock-patterns', found['model'], found['gpu'])}.json"
    if args.read is None:
        write_json(path, found)
    clock, rows, means = judge(found)
    show_table(("pattern", "", "steps", "% without", "abs", "% with", "abs"), rows)
    for name, value in sorted(means.items()):
        print(f"{name} the clock: mean absolute error {100 * value:.2f} %")
    print(f"clock: {clock}")
    if clock is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(found, clock, path.with_suffix(".svg"))
        print(f"written: {path.with_suffix('.svg')}")
    return 0


def measured(model: str) -> dict[str, Any]:
    """With where it comes from."""
    from gpu import require_gpu  # noqa: PLC0415 - reading needs none
    from model_folder import model_folder, model_name  # noqa: PLC0415

    require_gpu()
    with model_folder(model) as folder:
        return {**describe_run(RUNTIME_PACKAGES), "model": model_name(folder), **measure(folder)}


def read(path: Path) -> dict[str, Any]:
    """A file of an earlier run.

    Raises:
        ValueError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--read {path}: {error}; give a file that this script has written") from None
    if not isinstance(found, dict) or not {"model", "gpu", "kinds", "patterns"} <= found.keys():
        raise ValueError(f"--read {path}: has no patterns; give a file that this script has written")
    try:
        series_of(found)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"--read {path}: {error!r} in it; give a file that this script has written") from None
    return found


if __name__ == "__main__":
    raise SystemExit(main())
