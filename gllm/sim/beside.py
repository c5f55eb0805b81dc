"""What chunks beside decodes take more than a profile's tables of both say, measured as whole steps.

`mixed` is measured beside a base chunk. Longer prompts lose more than that: their queries, keys and values wait in the
L2 cache for their attention, and what decodes read of their caches drives them out. A profile has steps of one prompt
and decodes (`beside`); what they take more than the tables say is read by prompt tokens and by the tokens of all
decodes' contexts, linearly, from nothing at a base chunk and without decodes; beyond the last points it stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING

from gllm.sim.interpolation import inside, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gllm.sim.cost import Work
    from gllm.sim.profile import MeasuredStep


class BesideDecodes:
    """Nanoseconds of all layers.

    Args:
        steps: that were measured; of one sum of contexts no two with as many prompt tokens.
        tables_ns: what the tables say of a step.
        base_chunk: so many tokens take nothing more; all steps have more tokens in chunks.
    """

    def __init__(self, steps: Sequence[MeasuredStep], tables_ns: Callable[[Work], float], base_chunk: int) -> None:
        more_ns: dict[int, dict[int, float]] = defaultdict(dict)
        for work, stage_ns in steps:
            more_ns[work.decode_context][work.num_prefill_tokens] = sum(stage_ns) - tables_ns(work)
        self._contexts = (0, *sorted(more_ns))
        self._lines = []
        for context in self._contexts[1:]:
            tokens, times = zip(*sorted(more_ns[context].items()), strict=True)
            at = (0, base_chunk, *tokens)
            self._lines.append((at, pieces(at, (0.0, 0.0, *times))))
        self.by_context = cache(self._by_context)

    def _by_context(self, num_tokens: int) -> Callable[[int], float]:
        """Of chunks of so many tokens in all."""
        contexts = self._contexts
        parts = pieces(contexts, [0.0, *(inside(*line, num_tokens) for line in self._lines)])

        def more_ns(context: int) -> float:  # `inside`, without another call on a hot path
            start, start_ns, slope = parts[bisect_right(contexts, context) - 1]
            return start_ns + slope * (context - start)

        return more_ns
