"""Weighted undirected graphs of devices, and shortest paths in them. Imports no jax."""

from __future__ import annotations

import functools
import heapq
import math
import numbers
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uoe_jax.errors import ConfigError, shown

_DENSE = 1024  # vertices whose distances are found by Floyd and Warshall's recursion
_MOST = 20_000  # vertices between all of which distances are kept


@dataclass(frozen=True, kw_only=True)
class Box:
    """A whole box of chips: its sides, and which are closed to rings (0: open).

    Vertices are in the order of the coordinates, the last of them fastest.
    """

    sides: tuple[int, ...]
    rings: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph; an edge's weight is the cost of crossing it, above zero.

    `links` holds for each vertex its neighbours and the weights, neighbours ascending.
    """

    links: tuple[tuple[tuple[int, float], ...], ...]
    names: tuple[str, ...]
    places: np.ndarray | None = None  # (vertices, dimensions) coordinates
    box: Box | None = None  # where the vertices are one, each edge of weight 1

    @property
    def size(self) -> int:
        """Return how many vertices there are."""
        return len(self.links)

    def edges(self) -> list[tuple[int, int, float]]:
        """Return every edge once as (first, second, weight), the first one lower."""
        return [(u, v, w) for u, row in enumerate(self.links) for v, w in row if u < v]

    @functools.cached_property
    def least(self) -> float:
        """Return the least weight of an edge; 1 where there is none."""
        return min((w for row in self.links for _, w in row), default=1.0)

    @functools.cached_property
    def switched(self) -> bool:
        """Whether every pair of vertices is joined at one cost: a switch."""
        rest = self.size - 1
        return all(
            len(row) == rest and all(w == self.least for _, w in row)
            for row in self.links
        )

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """Return the lengths of shortest paths between all pairs; inf: no path."""
        if self.size > _MOST:
            raise ConfigError(
                f"distances between all {self.size} vertices take too much memory; use "
                f"at most {_MOST}, or an oracle"
            )
        if self.box is not None:
            return _box_distances(self.box)
        if self.size <= _DENSE:
            return _all_pairs(self)
        return _sparse_distances(self)

    def components(self) -> list[list[int]]:
        """Return the connected parts, each ascending, the lowest vertex's first."""
        return split_components(self, range(self.size))

    def without(self, dead: Collection[int]) -> tuple[Graph, np.ndarray]:
        """Return the graph of the other vertices, and their old numbers.

        Raises:
          ConfigError: a vertex that isn't there, or none left.
        """
        if not dead:
            return self, np.arange(self.size)
        for vertex in dead:
            check_whole(vertex, "a dead device")
            if not 0 <= vertex < self.size:
                raise ConfigError(
                    f"dead device {vertex} isn't there; use numbers from 0 to "
                    f"{self.size - 1}"
                )
        kept = np.array(sorted(set(range(self.size)) - set(dead)), int)
        if not len(kept):
            raise ConfigError(
                f"all {self.size} devices are dead; leave at least one alive"
            )
        number = {int(old): new for new, old in enumerate(kept)}
        links = tuple(
            tuple((number[v], w) for v, w in self.links[old] if v in number)
            for old in kept
        )
        places = None if self.places is None else self.places[kept]
        return Graph(links, tuple(self.names[i] for i in kept), places), kept


def make_graph(
    size: int,
    edges: Iterable[tuple[int, int, float]],
    names: Sequence[str] | None = None,
    places: np.ndarray | None = None,
) -> Graph:
    """Return a graph; of parallel edges the lightest stays, self loops are dropped.

    Raises:
      ConfigError: an edge's end that isn't a number of a vertex, or a weight that isn't
        a number above zero.
    """
    rows: list[dict[int, float]] = [{} for _ in range(size)]
    for u, v, weight in edges:
        for end in (u, v):
            check_whole(end, f"an end of the edge {u}-{v}")
            if not 0 <= end < size:
                raise ConfigError(
                    f"the edge {u}-{v} has an end {end} that isn't there; use numbers "
                    f"from 0 to {size - 1}"
                )
        if not (is_finite(weight) and weight > 0):
            raise ConfigError(
                f"the edge {u}-{v} has weight {shown(weight)}; it must be a positive, "
                "finite number"
            )
        if u != v:
            least = min(weight, rows[u].get(v, math.inf))
            rows[u][v] = rows[v][u] = float(least)
    if names is None:
        names = [str(number) for number in range(size)]
    links = tuple(tuple(sorted(row.items())) for row in rows)
    return Graph(links, tuple(names), places)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False aren't."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def check_whole(value: object, what: str) -> None:
    """Raise ConfigError for a number of a device or a size that isn't a whole one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{what} is {shown(value)}; it must be a whole number")


def box_graph(sides: Sequence[int], rings: Sequence[int]) -> Graph:
    """Return a grid of chips; sides with a ring have their ends joined.

    Vertices are numbered with the last coordinate fastest.
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(sides)), sides), 1)
    number = np.arange(len(places)).reshape(sides)
    edges = []
    for axis, (side, ring) in enumerate(zip(sides, rings, strict=True)):
        after = np.roll(number, -1, axis)
        pairs = np.stack([number, after], -1)
        if not ring:
            pairs = pairs.take(range(side - 1), axis)
        edges += [(int(u), int(v), 1.0) for u, v in pairs.reshape(-1, 2)]
    plain = make_graph(len(places), edges, places=places)
    box = Box(sides=tuple(sides), rings=tuple(rings))
    return Graph(plain.links, plain.names, places, box)


def shortest_paths(
    graph: Graph,
    sources: Iterable[int],
    inside: Collection[int] | None = None,
    limit: float = math.inf,
) -> tuple[dict[int, float], dict[int, int]]:
    """Return distances from the nearest source, nearest first, and the vertex before.

    A source's vertex before is itself. Ties go to the lower vertex before. `inside` are
    the vertices that paths may use, `limit` is how far they go.
    """
    links, found, before = graph.links, {}, {}
    queue = [(0.0, source, source) for source in sorted(set(sources))]
    while queue:
        length, last, vertex = heapq.heappop(queue)
        if vertex in found:
            continue
        found[vertex], before[vertex] = length, last
        for other, weight in links[vertex]:
            if other in found or (inside is not None and other not in inside):
                continue
            if length + weight <= limit:
                heapq.heappush(queue, (length + weight, vertex, other))
    return found, before


def split_components(graph: Graph, vertices: Iterable[int]) -> list[list[int]]:
    """Return the connected parts of some vertices, each ascending, lowest first."""
    left, parts = set(vertices), []
    for first in sorted(left):
        if first not in left:
            continue
        left.remove(first)
        part, queue = [first], [first]
        while queue:
            for other, _ in graph.links[queue.pop()]:
                if other in left:
                    left.remove(other)
                    part.append(other)
                    queue.append(other)
        parts.append(sorted(part))
    return parts


def check_connected(graph: Graph) -> None:
    """Raise ConfigError for a graph of several parts, or of none."""
    if graph.size == 0:
        raise ConfigError("the graph has no vertices; it needs at least one")
    parts = graph.components()
    if len(parts) > 1:
        cut = min(parts, key=len)
        raise ConfigError(
            f"the devices fall into {len(parts)} parts with no link between them "
            f"({graph.names[cut[0]]} is in one of {len(cut)}); join them, or give each "
            "part a mesh of its own"
        )


def _sparse_distances(graph: Graph) -> np.ndarray:
    """Return distances by Dijkstra from some vertices after others, in float32."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    lengths = [len(row) for row in graph.links]
    ends = np.array([v for row in graph.links for v, _ in row], np.int32)
    weights = np.array([w for row in graph.links for _, w in row], float)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    matrix = csr_array((weights, ends, starts), (graph.size, graph.size))
    found = np.empty((graph.size, graph.size), np.float32)
    for first in range(0, graph.size, _DENSE):  # a table of float64 would be twice it
        rows = np.arange(first, min(first + _DENSE, graph.size))
        found[rows] = dijkstra(matrix, indices=rows)
    return found


def _all_pairs(graph: Graph) -> np.ndarray:
    found = np.full((graph.size, graph.size), np.inf)
    np.fill_diagonal(found, 0)
    for u, v, weight in graph.edges():
        found[u, v] = found[v, u] = weight
    for middle in range(graph.size):
        through = found[:, middle, None] + found[None, middle]
        np.minimum(found, through, out=found)
    return found


def _box_distances(box: Box) -> np.ndarray:
    count = math.prod(box.sides)
    places = np.unravel_index(np.arange(count), box.sides)
    found = np.zeros((count, count), np.float64 if count <= 4096 else np.float32)
    for place, ring in zip(places, box.rings, strict=True):
        apart = np.abs(place[:, None] - place[None])
        found += np.minimum(apart, ring - apart) if ring else apart
    return found
