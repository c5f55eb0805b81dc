"""A profile: how long real workers took for the parts of a step, as `python -m gllm.runtime profile` wrote it.

docs/profile.md says what each table holds and how a step's time is composed of them (`gllm.sim.profiled` does that);
here the file is read. Times are nanoseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gllm.chunk_schedule import MOST_EACH, ChunkKernel
from gllm.gpu_clock import GpuClock, PowerLimit
from gllm.model_shape import ModelShape
from gllm.parallel import Parallel
from gllm.sim.cost import BatchWork, batch_work
from gllm.sim.gpus import GPUS
from gllm.sim.profile_fields import AGAIN, Fields

if TYPE_CHECKING:
    from gllm.sim.interpolation import Curve, Surface

PROFILES = Path(__file__).with_name("profiles")
FORMAT, VERSION = "gllm-profile", 1


class MeasuredStep(NamedTuple):
    """A whole step as it was measured."""

    work: BatchWork
    stage_ns: tuple[int, ...]


class StepRoom(NamedTuple):
    """What the steps that were measured could hold."""

    num_sequences: int
    num_tokens: int
    num_blocks: int
    block_size: int

    def num_each(self, num_tokens: int, start: int) -> int:
        """How many equal chunks `prefill_each` is of there."""
        num_blocks = -(-(start + num_tokens) // self.block_size)
        most = min(MOST_EACH, self.num_sequences, self.num_tokens // num_tokens, self.num_blocks // num_blocks)
        return max(most, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Times of one model on one kind of GPU; tables are of all `num_layers` layers, on all stages together."""

    name: str  # the file's
    shape: ModelShape
    gpu: str | None  # one of GPUS; None: none of them
    device: str
    parallel: Parallel
    date: str
    num_layers: int
    base_chunk: int  # tokens of the chunks that `tokens` is measured with
    graph_sizes: tuple[int, ...]  # decodes alone; `decode` has a point at each
    token_graph_sizes: tuple[int, ...]  # tokens of a step with chunks; `tokens` has a point at each
    decode: Curve  # by sequences
    decode_attention: Surface  # by sequences, then tokens of context
    tokens: Curve  # by tokens
    mixed: Surface  # by sequences, then tokens of context
    prefill_one: Surface  # by tokens of a chunk, then tokens before it
    prefill_each: Surface
    head: Curve  # by rows; `graph_head` where none was measured outside of graphs
    graph_head: Curve | None
    decode_gap_ns: int
    chunked_gap_ns: int
    transfer: Curve | None  # by tokens
    dispatch_ns: int
    return_ns: int
    intake_ns: int  # 0: it was not measured
    chunk_kernel: ChunkKernel | None  # of prefill attention; None: its schedule is not known
    room: StepRoom | None  # read with `chunk_kernel` alone
    clock: GpuClock | None  # times are after a rest; None: what a step takes does not depend on those before it
    beside: tuple[MeasuredStep, ...]  # one prompt and decodes (`gllm.sim.beside`); none: it was not measured
    checks: tuple[MeasuredStep, ...]  # that are for no table


def list_profiles() -> tuple[Profile, ...]:
    """Profiles that come with the package, by name."""
    return tuple(_packaged(path) for path in sorted(PROFILES.glob("*.json")))


def find_profile(name_or_path: str, shape: ModelShape, gpu: str, parallel: Parallel) -> Profile | None:
    """The profile to simulate a model with.

    Args:
        name_or_path: the name of a packaged profile; a file; "auto", the packaged one of this model, kind of GPU, tp
            and ep, if there is one (the same pp goes first, then the newest); or "none". Write ./auto for a file.
        shape: the model.
        gpu: name of the GPU to simulate. A profile that was asked for by name may be of another.
        parallel: how the model is spread.

    Raises:
        ValueError: no such profile, one that cannot be read, or one of another model, tp or ep.
    """
    if name_or_path == "none":
        return None
    if name_or_path == "auto":
        fitting = [each for each in list_profiles() if each.gpu == gpu and _misfit(each, shape, parallel) is None]
        return max(fitting, key=lambda each: (each.parallel.pp == parallel.pp, each.date, each.name), default=None)
    known = PROFILES / f"{name_or_path}.json"
    is_name = "/" not in name_or_path and known.is_file()
    profile = _packaged(known) if is_name else read_profile(Path(name_or_path).expanduser())
    misfit = _misfit(profile, shape, parallel)
    if misfit is not None:
        raise ValueError(f"--profile {name_or_path}: {misfit}; choose another one, or --profile none")
    return profile


def _misfit(profile: Profile, shape: ModelShape, parallel: Parallel) -> str | None:
    """Why a profile cannot serve; None if it can."""
    ours, theirs = asdict(replace(shape, name="")), asdict(replace(profile.shape, name=""))
    for key, value in ours.items():
        if theirs[key] != value:
            return f"it is of {profile.shape.name}, whose {key} is {theirs[key]}, not {value} as {shape.name}'s"
    for key in ("tp", "ep"):
        made, wanted = getattr(profile.parallel, key), getattr(parallel, key)
        if made != wanted:
            return f"it was made with {key} {made}, the run has --{key} {wanted}"
    return None


@cache
def _packaged(path: Path) -> Profile:
    return read_profile(path)


def read_profile(path: Path) -> Profile:
    """Read and check a file.

    Raises:
        ValueError: one line: the file, the field and what is wrong with it.
    """
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in PROFILES.glob("*.json"))) or "none"
        raise ValueError(f"profile {path}: no such file; packaged profiles: {names}")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f'{path}: not a profile (its "format" is not "{FORMAT}"); {AGAIN}')
    if contents.get("version") != VERSION:
        raise ValueError(f"{path}: field version is {contents.get('version')!r}, known is {VERSION}; {AGAIN}")
    return _profile(Fields(contents, path), path.stem)


def _profile(top: Fields, name: str) -> Profile:
    parallel = _parallel(top.part("parallel"))
    prefill, gap, host = top.part("prefill_attention"), top.part("gap"), top.part("host")
    graph_head = None if top.is_absent("graph_head") else top.part("graph_head").curve("rows")
    graph_sizes = top.points("graph_sizes", 1, may_be_empty=True)
    token_graph_sizes = top.points("token_graph_sizes", 1, may_be_empty=True)
    return Profile(
        name=name,
        shape=_shape(top.part("model_shape")),
        gpu=None if top.get("gpu") is None else top.one_of("gpu", tuple(GPUS)),
        device=top.text("device"),
        parallel=parallel,
        date=top.part("made").text("date"),
        num_layers=top.whole("layers", 1),
        base_chunk=top.whole("base_chunk", 1),
        graph_sizes=graph_sizes,
        token_graph_sizes=token_graph_sizes,
        decode=_base(top.part("decode"), "batches", "graph_sizes", graph_sizes),
        decode_attention=top.part("decode_attention").surface("batches", "contexts", "ns"),
        tokens=_base(top.part("tokens"), "tokens", "token_graph_sizes", token_graph_sizes),
        mixed=top.part("mixed").surface("batches", "contexts", "ns"),
        prefill_one=prefill.surface("queries", "starts", "one_ns"),
        prefill_each=prefill.surface("queries", "starts", "each_ns"),
        head=graph_head if graph_head and top.is_absent("head") else top.part("head").curve("rows"),
        graph_head=graph_head,
        decode_gap_ns=gap.whole("decode_ns"),
        chunked_gap_ns=gap.whole("chunked_ns"),
        transfer=None if top.is_absent("transfer") else top.part("transfer").curve("tokens"),
        dispatch_ns=host.whole("dispatch_ns"),
        return_ns=host.whole("return_ns"),
        intake_ns=0 if host.is_absent("intake_ns") else host.whole("intake_ns"),
        chunk_kernel=None if top.is_absent("chunk_kernel") else _chunk_kernel(top.part("chunk_kernel")),
        room=None if top.is_absent("chunk_kernel") else _room(top),
        clock=None if top.is_absent("clock") else _clock(top.part("clock")),
        beside=() if top.is_absent("beside") else _beside(top, parallel.pp),
        checks=tuple(_measured_step(part, parallel.pp) for part in top.parts("checks")),
    )


def _base(part: Fields, points: str, field: str, sizes: tuple[int, ...]) -> Curve:
    """With a point at each of the sizes of graphs, which are in that field."""
    curve = part.curve(points)
    missing = [size for size in sizes if size not in curve.at]
    if missing:
        raise part.wrong(points, f"has no point at {missing[0]}, which is in {field}")
    return curve


def _chunk_kernel(part: Fields) -> ChunkKernel:
    return ChunkKernel(**{field.name: part.whole(field.name, 1) for field in fields(ChunkKernel)})


def _room(top: Fields) -> StepRoom:
    limits = [top.whole(name, 1) for name in ("max_tokens", "num_blocks", "block_size")]
    return StepRoom(top.part("decode").points("batches", 1)[-1], *limits)


def _clock(part: Fields) -> GpuClock:
    """Older files have one limit, without a list, and take power from rates alone."""
    limits = [part] if part.is_absent("limits") else part.parts("limits")
    found = GpuClock(limits=tuple(_limit(each) for each in limits), attention=part.share("attention"))
    if part.is_absent("limits"):
        return found
    tokens, power = part.points("tokens", 1), part.numbers("power", part.get("power"))
    if len(power) != len(tokens):
        raise part.wrong("power", f"has {len(power)} numbers for {len(tokens)} tokens")
    decode = None if part.is_absent("decode") else part.numbers("decode", [part.get("decode")])[0]
    return replace(found, prefill=part.share("prefill", up_to_one=True), tokens=tokens, power=power, decode=decode)


def _limit(part: Fields) -> PowerLimit:
    return PowerLimit(tau_ns=part.whole("tau_ns", 1), slowdown=part.share("slowdown"), knee=part.share("knee"))


def _parallel(part: Fields) -> Parallel:
    pp, tp, ep = (part.whole(key, 1) for key in ("pp", "tp", "ep"))
    try:
        return Parallel(pp=pp, tp=tp, ep=ep)
    except ValueError as error:
        raise part.wrong("", str(error)) from None


_KINDS: dict[str, type] = {"int": int, "bool": bool, "str": str}


def _shape(part: Fields) -> ModelShape:
    values: dict[str, Any] = {}
    for field in fields(ModelShape):
        if field.name == "moe_layers":
            values[field.name] = part.points(field.name, 0, may_be_empty=True)
            continue
        value = part.get(field.name)
        if type(value) is not _KINDS[str(field.type)] or (type(value) is int and value < 0):
            raise part.wrong(field.name, f"is {value!r}, which no model's is")
        values[field.name] = value
    return ModelShape(**values)


def _beside(top: Fields, num_stages: int) -> tuple[MeasuredStep, ...]:
    base_chunk, found = top.whole("base_chunk", 1), {}
    for part in top.parts("beside"):
        step = _measured_step(part, num_stages)
        point = step.work.decode_context, step.work.num_prefill_tokens
        if not step.work.num_decode_tokens or step.work.num_prefill_tokens <= base_chunk:
            raise part.wrong("", f"must hold decodes, and more than {base_chunk} tokens in chunks")
        if point in found:
            raise part.wrong("", "holds as many tokens in chunks and contexts as one before")
        found[point] = step
    return tuple(found.values())


def _measured_step(part: Fields, num_stages: int) -> MeasuredStep:
    chunks = part.get("chunks")
    if not isinstance(chunks, list):
        raise part.wrong("chunks", "is no list")
    pairs = [part.integers("chunks", chunk) for chunk in chunks]
    if any(len(pair) != 2 or pair[1] < 1 for pair in pairs):
        raise part.wrong("chunks", "must hold pairs of a start and a number of tokens")
    contexts = part.integers("contexts", part.get("contexts"), 1)
    stage_ns = part.integers("stage_ns", part.get("stage_ns"), 1)
    if len(stage_ns) != num_stages:
        raise part.wrong("stage_ns", f"has {len(stage_ns)} times for {num_stages} stages")
    if not pairs and not contexts:
        raise part.wrong("", "has neither chunks nor contexts")
    chunks = [(start, num_tokens) for start, num_tokens in pairs]
    work = batch_work(chunks=chunks, contexts=contexts, num_sampled=part.whole("num_sampled"))
    return MeasuredStep(work, stage_ns)
