"""From the times of mixes to a profile's tables. Integers throughout; docs/profile.md says how they are composed."""

from __future__ import annotations

from bisect import bisect_left
from statistics import median_low
from typing import TYPE_CHECKING, Any

from gllm.graph_sizes import as_measured
from gllm.runtime.profile.grids import BASE_CHUNK
from gllm.runtime.profile.steps import chunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gllm.runtime.profile.grids import Grid
    from gllm.runtime.profile.measure import Times
    from gllm.runtime.profile.steps import Mix

    Table = dict[str, Any]


def make_tables(grid: Grid, times: Mapping[Mix, Times], transfer_ns: Mapping[int, int]) -> dict[str, Any]:
    """All tables of a profile.

    Args:
        grid: their points.
        times: of the grid's mixes.
        transfer_ns: by tokens; empty with one stage.
    """
    base = _Base(grid, times)
    attention = _attention_rows(grid, times)
    graph_sizes = [num for num in grid.decode_batches if num in grid.room.graph_sizes]
    return {
        "base_chunk": BASE_CHUNK,
        "max_tokens": grid.room.max_tokens,
        "graph_sizes": graph_sizes,
        "token_graph_sizes": grid.room.token_graph_sizes,
        "decode": _curve("batches", {num: times[grid.decode(num)].layers_ns for num in grid.decode_batches}),
        "decode_attention": {"batches": grid.batches, "contexts": grid.contexts, "ns": list(attention.values())},
        "tokens": _curve("tokens", base.ns),
        "mixed": _mixed(grid, times, base, attention),
        "prefill_attention": _prefill_attention(grid, base),
        "head": _curve("rows", {num: times[grid.head(num)].head_ns for num in grid.head_rows}) or None,
        "graph_head": _curve("rows", {num: times[grid.decode(num)].head_ns for num in graph_sizes}) or None,
        "gap": {
            "decode_ns": _gap(times, (grid.decode(num) for num in graph_sizes or grid.decode_batches)),
            "chunked_ns": _gap(times, (grid.base(num) for num in grid.tokens)),
        },
        "transfer": _curve("tokens", transfer_ns) or None,
        "beside": [_whole_step(mix, times[mix]) for mix in grid.beside],
        "checks": [_whole_step(mix, times[mix]) for mix in grid.checks],
    }


class _Base:
    """What tokens cost without attention to speak of, which all other tables are beyond."""

    def __init__(self, grid: Grid, times: Mapping[Mix, Times]) -> None:
        self._grid, self._times, self._graph_sizes = grid, times, grid.room.token_graph_sizes
        self.ns = {num: times[grid.base(num)].layers_ns for num in grid.tokens}

    def beyond(self, mix: Mix) -> int:
        """What a mix takes beyond its tokens' base."""
        return self._times[mix].layers_ns - self._at(mix.num_tokens)

    def _at(self, num_tokens: int) -> int:
        """As measured, or as who reads the table sees it."""
        measured = self._times.get(self._grid.base(num_tokens))
        if measured is not None:
            return measured.layers_ns
        points = list(self.ns)
        at = as_measured(num_tokens, self._graph_sizes, points)
        index = bisect_left(points, at)
        left, right = points[index - 1], points[index]
        return self.ns[at] if at == right else _on_line((left, self.ns[left]), (right, self.ns[right]), at)


def _attention_rows(grid: Grid, times: Mapping[Mix, Times]) -> dict[int, list[int | None]]:
    """Of decodes alone: by sequences, what longer contexts take, in their order."""

    def row(num: int) -> list[int | None]:
        found = [times.get(grid.attending(num, context)) for context in grid.contexts]
        least = times[grid.decode(num)].layers_ns
        return [None if each is None else each.layers_ns - least for each in found]

    return {num: row(num) for num in grid.batches}


def _mixed(grid: Grid, times: Mapping[Mix, Times], base: _Base, attention: Mapping[int, list[int | None]]) -> Table:
    def beside(num: int, context: int) -> int | None:
        alone = _between(attention, num, grid.contexts.index(context))
        mix = grid.mixed(num, context)
        return None if alone is None or mix not in times else base.beyond(mix) - alone

    rows = [[beside(num, context) for context in grid.mixed_contexts] for num in grid.mixed_batches]
    return {"batches": grid.mixed_batches, "contexts": grid.mixed_contexts, "ns": rows}


def _between(rows: Mapping[int, list[int | None]], num: int, column: int) -> int | None:
    """As who reads the table sees it: on the line from one row to the next; None where one has nothing there."""
    if num in rows:
        return rows[num][column]
    points = list(rows)
    index = bisect_left(points, num)
    left, right = points[index - 1], points[index]
    left_ns, right_ns = rows[left][column], rows[right][column]
    if left_ns is None or right_ns is None:
        return None
    return _on_line((left, left_ns), (right, right_ns), num)


def _on_line(left: tuple[int, int], right: tuple[int, int], at: int) -> int:
    """Of the line through two points, in whole numbers."""
    (left_at, left_ns), (right_at, right_ns) = left, right
    return left_ns + (right_ns - left_ns) * (at - left_at) // (right_at - left_at)


def _prefill_attention(grid: Grid, base: _Base) -> Table:
    def each(num_tokens: int, start: int, num: int) -> int | None:
        return base.beyond(chunks(num, start, num_tokens)) // num if num else None

    counts = [[(num, start, grid.num_each(num, start)) for start in grid.starts] for num in grid.queries]
    return {
        "queries": grid.queries,
        "starts": grid.starts,
        "one_ns": [[each(num, start, min(most, 1)) for num, start, most in row] for row in counts],
        "each_ns": [[each(*point) for point in row] for row in counts],
    }


def _curve(name: str, ns: Mapping[int, int]) -> Table:
    """Empty where there are no points."""
    return {name: list(ns), "ns": list(ns.values())} if ns else {}


def _gap(times: Mapping[Mix, Times], mixes: Iterable[Mix]) -> int:
    found = [gap_ns for mix in mixes if (gap_ns := times[mix].gap_ns) is not None]
    return median_low(found)


def _whole_step(mix: Mix, found: Times) -> dict[str, Any]:
    return {
        "chunks": mix.chunks,
        "contexts": mix.contexts,
        "num_sampled": mix.num_sampled,
        "stage_ns": found.stage_ns,
    }
