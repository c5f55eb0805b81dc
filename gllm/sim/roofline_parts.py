"""The roofline's figures for the parts of a step that a profile is made of.

A profile goes on beyond its tables in proportion to them, and from the GPU it was made on to another one.
"""

from __future__ import annotations

from dataclasses import replace
from math import fsum
from typing import TYPE_CHECKING

from gllm.sim.cost import BatchWork, batch_work
from gllm.sim.interpolation import Curve, Surface
from gllm.sim.roofline import Roofline

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.model_shape import ModelShape
    from gllm.parallel import Parallel
    from gllm.sim.constants import RooflineConstants
    from gllm.sim.gpus import Gpu
    from gllm.sim.profile import Profile

_BASE = ("gemm", "all_reduce", "other")


class RooflineParts:
    """Nanoseconds of all layers of a model on one kind of GPU; each figure is above zero.

    They are of the work itself, without padding and launches: what was measured has those in it already, and the next
    size of a graph is no step in what goes on from there.

    Where a profile's part is what a step takes beyond another one, the figure is of the whole operation: it serves
    for proportions.
    """

    def __init__(
        self, profile: Profile, shape: ModelShape, gpu: Gpu, parallel: Parallel, constants: RooflineConstants
    ) -> None:
        whole, work = replace(parallel, pp=1, pp_layers=None), replace(constants, max_graph_size=0, launch_ns=0)
        self._whole = Roofline(shape=shape, gpu=gpu, parallel=whole, constants=work)
        self._staged = Roofline(shape=shape, gpu=gpu, parallel=parallel, constants=constants)
        self._base_chunk, self._context = profile.base_chunk, profile.decode_attention.columns[0]

    def _ns(self, work: BatchWork, *names: str) -> float:
        parts = self._whole.components(work)
        return fsum(parts[name][0] for name in names)

    def _decodes(self, num_decode: int, context: int) -> BatchWork:
        return BatchWork(num_decode_tokens=num_decode, decode_context=context)

    def decode(self, num_decode: int) -> float:
        """A decode step at the profile's smallest context, without the head."""
        work = self._decodes(num_decode, num_decode * self._context)
        return self._ns(work, *_BASE, "decode_attention")

    def decode_attention(self, num_decode: int, context: int) -> float:
        """Over `context` tokens, all sequences together."""
        return self._ns(self._decodes(num_decode, context), "decode_attention")

    def mixed(self, num_decode: int) -> float:
        """What decodes add to a step of chunks: their attention at the profile's smallest context."""
        return self.decode_attention(num_decode, num_decode * self._context)

    def tokens(self, num_tokens: int) -> float:
        """A step of base chunks, without the head."""
        full, rest = divmod(num_tokens, self._base_chunk)
        sizes = [self._base_chunk] * full + [rest] * (rest > 0)
        return self._ns(batch_work(chunks=[(0, size) for size in sizes]), *_BASE, "prefill_attention")

    def prefill_attention(self, num_tokens: int, start: int) -> float:
        """Of one chunk."""
        return self._ns(batch_work(chunks=[(start, num_tokens)]), "prefill_attention")

    def head(self, num_rows: int) -> float:
        """Final norm, logits and sampling."""
        return self._ns(BatchWork(num_decode_tokens=1, num_sampled=num_rows), "head")

    def transfer(self, num_tokens: int) -> int:
        """From one stage to the next; zero with a single stage."""
        return self._staged.transfer_ns(BatchWork(num_prefill_tokens=num_tokens))


def scaled(profile: Profile, source: RooflineParts, target: RooflineParts) -> Profile:
    """The profile as if made on another GPU: each time by what the roofline says of the two. What the host does stays.

    Transfers are dropped where `source` has a single stage, which has none. The clock stays: whatever the other card's
    is like, without one its steps in a row would take what rested ones do. The schedule of attention's kernel is
    dropped, too: it is that of a card with so many multiprocessors. So are steps of prompts beside decodes, whose times
    are beyond those of the tables as they were measured.
    """
    has_transfer = profile.transfer is not None and source.transfer(1) > 0
    attention = _ratio(source.prefill_attention, target.prefill_attention)
    head = _ratio(source.head, target.head)
    return replace(
        profile,
        chunk_kernel=None,
        beside=(),
        decode=_scaled_curve(profile.decode, _ratio(source.decode, target.decode)),
        decode_attention=_scaled_surface(
            profile.decode_attention,
            lambda n, mean: target.decode_attention(n, n * mean) / source.decode_attention(n, n * mean),
        ),
        tokens=_scaled_curve(profile.tokens, _ratio(source.tokens, target.tokens)),
        mixed=_scaled_surface(profile.mixed, lambda n, _: target.mixed(n) / source.mixed(n)),
        prefill_one=_scaled_surface(profile.prefill_one, attention),
        prefill_each=_scaled_surface(profile.prefill_each, attention),
        head=_scaled_curve(profile.head, head),
        graph_head=None if profile.graph_head is None else _scaled_curve(profile.graph_head, head),
        transfer=_scaled_curve(profile.transfer, _ratio(source.transfer, target.transfer))
        if profile.transfer is not None and has_transfer
        else None,
    )


def _ratio(source: Callable[..., float], target: Callable[..., float]) -> Callable[..., float]:
    return lambda *point: target(*point) / source(*point)


def _scaled_curve(curve: Curve, ratio: Callable[[int], float]) -> Curve:
    return Curve(curve.at, tuple(ns * ratio(at) for at, ns in zip(curve.at, curve.ns, strict=True)))


def _scaled_surface(surface: Surface, ratio: Callable[[int, int], float]) -> Surface:
    def line(row: int, times: tuple[float | None, ...]) -> tuple[float | None, ...]:
        pairs = zip(surface.columns, times, strict=True)
        return tuple(None if ns is None else ns * ratio(row, column) for column, ns in pairs)

    return surface._replace(ns=tuple(map(line, surface.rows, surface.ns)))
