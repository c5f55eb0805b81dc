"""How long a micro-batch takes, from a profile: times that real workers took for its parts, added up.

docs/profile.md has the composition. L layers of a stage, all of the profile's:

    decodes alone, n of them     decode(n) + decode_attention(n, context)          by L / all
    any other, T tokens          tokens(T) + decode_attention(n, context) + mixed(n, context)
                                 + beside(T - n, context) + prefill_attention(chunks)      by L / all
    the last stage besides       head(rows)
    between steps of a stage     gap

Where the profile has a clock (`gllm.gpu_clock`), these are times after a rest, and arithmetic, which is all but the
attention of decodes and the head, is stretched by what each stage computed before.

Where a step is a CUDA graph, decode(n) and tokens(T) are of the next captured size, and so is the head; of a model
whose padding costs less than tokens (it visits no expert) they lie between what is measured of that size. Beyond its
tables a part goes on as the roofline does, scaled to the nearest measured point; `Profiled.notes` says which did.
"""

from __future__ import annotations

from functools import cache, partial
from math import fsum
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from gllm.graph_sizes import as_measured, padded
from gllm.parallel import Parallel
from gllm.sim.beside import BesideDecodes
from gllm.sim.constants import RooflineConstants
from gllm.sim.cost import COMPONENTS, Load, kept_tokens, tokens_from_memory
from gllm.sim.gpus import GPUS
from gllm.sim.interpolation import Curve, Sheet, look_up, look_up_padded
from gllm.sim.prefill_attention import PrefillAttention
from gllm.sim.roofline_parts import RooflineParts, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gllm.model_shape import ModelShape
    from gllm.sim.cost import Work
    from gllm.sim.gpus import Gpu
    from gllm.sim.profile import Profile


class Profiled:
    """The cost model of a profile's model on `gpu`, in any number of stages.

    `notes` are lines for the user: where figures are not the profile's own, each once, as it comes to that.

    Raises:
        ValueError: the model cannot be spread so.
    """

    def __init__(
        self,
        *,
        profile: Profile,
        shape: ModelShape,
        gpu: Gpu,
        parallel: Parallel = Parallel(),
        constants: RooflineConstants = RooflineConstants(),
    ) -> None:
        self.num_stages, self.host_ns, self.return_ns = parallel.pp, profile.dispatch_ns, profile.return_ns
        self.intake_ns = profile.intake_ns
        self.notes: list[str] = []
        self._given = partial(Profiled, profile=profile, shape=shape, gpu=gpu, parallel=parallel, constants=constants)
        self._roofline = RooflineParts(profile, shape, gpu, parallel, constants)
        self._profile = self._on_gpu(profile, shape, gpu, parallel, constants)
        self._num_layers = [stage.num_layers for stage in parallel.stages(shape)]
        self._all_layers = profile.num_layers
        self._kept_tokens = kept_tokens(shape, gpu, parallel)
        self.clock = self._profile.clock
        if parallel.pp > 1 and profile.transfer is None:
            self._note("transfers between stages are the roofline's: the profile was made with one stage")
        self._prepare()

    def __reduce__(self) -> tuple[partial[Profiled], tuple[()]]:
        """Pickle as the configuration, for sweeps over processes."""
        return self._given, ()

    def _prepare(self) -> None:
        """Each count's cost is computed once; counts are bounded by the batch size."""
        profile, roofline = self._profile, self._roofline
        self._decode_ns = self._base(profile.decode, profile.graph_sizes, roofline.decode, "decode steps", "sequences")
        self._tokens_ns = cache(
            self._base(profile.tokens, profile.token_graph_sizes, roofline.tokens, "steps", "tokens")
        )
        self._head_ns = cache(self._head())
        self._transfer_ns = cache(self._transfer())
        attention = Sheet(
            profile.decode_attention,
            roofline.decode_attention,
            self._outside("decode attention", "sequences"),
            self._outside("decode attention", "tokens of context"),
            is_mean=True,
        )
        self._decode_attention = cache(lambda num_decode: attention.slice(num_decode).times())
        mixed = Sheet(
            profile.mixed,
            lambda num_decode, _: roofline.mixed(num_decode),  # beyond its contexts as at the nearest one
            self._outside("mixed steps", "sequences"),
            lambda _: None,
            is_mean=True,
        )
        self._mixed = cache(lambda num_decode: mixed.slice(num_decode).times())
        self._prefill = PrefillAttention(
            profile,
            roofline.prefill_attention,
            (
                self._outside("prefill attention", "tokens in a chunk"),
                self._outside("prefill attention", "tokens before a chunk"),
            ),
        )
        self._decode = cache(self._decode_step)
        beside = BesideDecodes(profile.beside, lambda work: fsum(self._tables(work)), profile.base_chunk)
        self._beside = beside.by_context
        # Both products and what a step takes grow with the model: their rate, by the best one, is one of tokens.
        self._best_rate = max((num / ns for num, ns in zip(*profile.tokens, strict=True) if ns), default=1.0)
        tokens, decode = profile.tokens.at, profile.decode.at
        chunked = partial(as_measured, sizes=profile.token_graph_sizes, measured=tokens)
        alone = partial(as_measured, sizes=profile.graph_sizes, measured=decode)
        self._base_power = cache(partial(self._power, chunked, self._tokens_ns, has_chunks=True))
        self._decode_power = cache(partial(self._power, alone, self._decode_ns, has_chunks=False))

    def _on_gpu(
        self, profile: Profile, shape: ModelShape, gpu: Gpu, parallel: Parallel, constants: RooflineConstants
    ) -> Profile:
        """The profile with the times that the GPU is expected to take."""
        if profile.gpu == gpu.name:
            return profile
        if profile.gpu is None:
            self._note(f"{profile.device} has no data sheet; beyond the tables the roofline is that of {gpu.name}")
            return profile
        self._note(f"times are an estimate: measured on {profile.gpu}, scaled to {gpu.name} by their rooflines")
        source = RooflineParts(profile, shape, GPUS[profile.gpu], parallel, constants)
        return scaled(profile, source, self._roofline)

    def _note(self, text: str) -> None:
        line = f"profile {self._given.keywords['profile'].name}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def _outside(self, part: str, unit: str) -> Callable[[str], None]:
        """Takes FEWER or MORE of the unit than were measured."""
        text = f"{part} of {{}} {unit} than measured: the roofline's, scaled to the nearest measured point"
        return lambda side: self._note(text.format(side))

    def _curve(self, curve: Curve, figure: Callable[[int], float], part: str, unit: str) -> Callable[[int], float]:
        outside = self._outside(part, unit)
        return lambda point: look_up(curve, point, figure, outside)

    def _base(
        self, curve: Curve, sizes: Sequence[int], figure: Callable[[int], float], part: str, unit: str
    ) -> Callable[[int], float]:
        return look_up_padded(curve, sizes, figure, self._outside(part, unit))

    def _rows(self, curve: Curve) -> Callable[[int], int]:
        time_ns = self._curve(curve, self._roofline.head, "the head", "rows")
        return lambda num_rows: int(time_ns(num_rows)) if num_rows else 0

    def _transfer(self) -> Callable[[int], int]:
        curve, figure = self._profile.transfer, self._roofline.transfer
        if curve is None or self.num_stages == 1:
            return figure
        time_ns = self._curve(curve, figure, "transfers", "tokens")
        return lambda num_tokens: int(time_ns(num_tokens))

    def _head(self) -> Callable[[int], int]:
        """By rows: a graph of its own behind any step, as far as the sizes of decode steps reach."""
        curve, sizes, eager_ns = self._profile.graph_head, self._profile.graph_sizes, self._rows(self._profile.head)
        if curve is None or not sizes:
            return eager_ns
        graph_ns = self._rows(curve)
        return lambda num_rows: graph_ns(padded(num_rows, sizes)) if 0 < num_rows <= sizes[-1] else eager_ns(num_rows)

    def _decode_step(self, num_decode: int) -> _DecodeStep:
        return _DecodeStep(self._decode_ns(num_decode), self._decode_attention(num_decode), self._head_ns(num_decode))

    def stage_ns(self, work: Work) -> list[int]:
        """How long each stage computes."""
        base_ns, decode_ns, prefill_ns, head_ns = self._parts(work)
        return self._by_stage(fsum((base_ns, decode_ns, prefill_ns)), head_ns)

    def load(self, work: Work) -> Load | None:
        """`stage_ns` and what the clock has to know of it; None without a clock."""
        clock = self.clock
        if clock is None:
            return None
        base_ns, decode_ns, prefill_ns, head_ns = self._parts(work)
        layers_ns, arithmetic_ns = fsum((base_ns, decode_ns, prefill_ns)), base_ns + prefill_ns
        stretched_ns = [arithmetic_ns * num_layers / self._all_layers for num_layers in self._num_layers]
        base_power = self._base_power if work.num_prefill_tokens else self._decode_power
        drawn = base_ns * base_power(work.num_prefill_tokens + work.num_decode_tokens)
        drawn += prefill_ns * clock.prefill + decode_ns * clock.attention
        power = min(drawn / layers_ns, 1.0) if layers_ns > 0 else 0.0  # parts may be below zero
        return Load(self._by_stage(layers_ns, head_ns), stretched_ns, power)

    def _by_stage(self, layers_ns: float, head_ns: int) -> list[int]:
        """Of a step its stages, which have so many of the layers each, and the last one the head."""
        all_layers = self._all_layers
        times = [int(layers_ns * num_layers / all_layers) for num_layers in self._num_layers]
        times[-1] += head_ns
        return times

    def _parts(self, work: Work) -> tuple[float, float, float, int]:
        """Of all layers: what depends on the number of tokens alone, decodes, prefill attention; and the head."""
        if work.num_prefill_tokens:
            return self._chunked_parts(work)
        base_ns, attention_ns, head_ns = self._decode(work.num_decode_tokens)
        return base_ns, attention_ns(tokens_from_memory(work, self._kept_tokens)), 0.0, head_ns

    def _power(
        self, as_computed: Callable[[int], int], base_ns: Callable[[int], float], num: int, *, has_chunks: bool
    ) -> float:
        """Of a step's base, by the rate of its tokens, those of padding too that costs what they do."""
        num_computed, time_ns = as_computed(num), base_ns(num)
        if self.clock is None or time_ns <= 0:
            return 0.0
        rate = min(1.0, num_computed / (time_ns * self._best_rate))
        return self.clock.base_power(num_computed, rate, has_chunks=has_chunks)

    def _chunked_parts(self, work: Work) -> tuple[float, float, float, int]:
        """Of all layers: the tokens' share, decodes, prefill attention; and the head."""
        base_ns, decode_ns, prefill_ns, head_ns = self._tables(work)
        if work.num_decode_tokens:
            decode_ns += self._beside(work.num_prefill_tokens)(tokens_from_memory(work, self._kept_tokens))
        return base_ns, decode_ns, prefill_ns, head_ns

    def _tables(self, work: Work) -> tuple[float, float, float, int]:
        """The same by all tables but that of chunks beside decodes, which was measured beyond them."""
        num_decode, decode_ns = work.num_decode_tokens, 0.0
        if num_decode:
            context = tokens_from_memory(work, self._kept_tokens)
            decode_ns = self._mixed(num_decode)(context) + self._decode_attention(num_decode)(context)
        num_tokens = work.num_prefill_tokens + num_decode
        base_ns, head_ns = self._tokens_ns(num_tokens), self._head_ns(work.num_sampled)
        return base_ns, decode_ns, self._prefill.time_ns(work.chunks, num_tokens, num_decode), head_ns

    def transfer_ns(self, work: Work) -> int:
        """How long hidden states take to the next stage; zero with a single stage."""
        return self._transfer_ns(work.num_prefill_tokens + work.num_decode_tokens)

    def gap_ns(self, work: Work) -> int:
        """How long a stage takes from one step to the next; before a graph of decodes less than before another step."""
        sizes = self._profile.graph_sizes
        is_other = work.num_prefill_tokens or (sizes and work.num_decode_tokens > sizes[-1])
        return self._profile.chunked_gap_ns if is_other else self._profile.decode_gap_ns

    def components(self, work: Work) -> dict[str, list[float]]:
        """Split `stage_ns` by component.

        `gemm` is the base, all that depends on the number of tokens alone: norms, all-reduces and kernel launches too.
        What decodes add to a step of chunks is `decode_attention`.
        """
        base_ns, decode_ns, prefill_ns, head_ns = self._parts(work)
        layers = {"gemm": base_ns, "decode_attention": decode_ns, "prefill_attention": prefill_ns}
        shares = {
            name: [layers.get(name, 0.0) * num_layers / self._all_layers for num_layers in self._num_layers]
            for name in COMPONENTS
        }
        head = [0.0] * (self.num_stages - 1) + [float(head_ns)]
        return {**shares, "head": head}


class _DecodeStep(NamedTuple):
    """A step of some number of decodes; its attention by the tokens of all contexts together."""

    base_ns: float
    attention_ns: Callable[[int], float]
    head_ns: int


class Residuals(NamedTuple):
    """How far predictions are from a profile's own checks, as shares of what was measured."""

    num_checks: int
    mean: float
    worst: float  # the one farthest from zero


def residuals(profile: Profile) -> Residuals | None:
    """Compare a profile with the steps that were measured for no table; None if there are none.

    Stages are taken together; so how layers were dealt does not matter.
    """
    gpu = GPUS[profile.gpu] if profile.gpu else next(iter(GPUS.values()))  # matters only beyond the tables
    parallel = Parallel(tp=profile.parallel.tp, ep=profile.parallel.ep)
    model = Profiled(profile=profile, shape=profile.shape, gpu=gpu, parallel=parallel)
    errors = []
    for work, stage_ns in profile.checks:
        predicted_ns = fsum(part[0] for part in model.components(work).values())
        errors.append(predicted_ns / sum(stage_ns) - 1.0)
    return Residuals(len(errors), fmean(errors), max(errors, key=abs)) if errors else None
