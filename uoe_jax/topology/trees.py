"""Spanning trees among which each pair of vertices has one that is short enough.

A tree cover of stretch 1 + eps (Chang et al. 2024 prove that a number that doesn't
depend on the graph's size is enough without a K_r minor). Here trees are chosen
greedily among trees of shortest paths from spread-out roots; on grids those are combs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from uoe_jax.errors import ConfigError, shown
from uoe_jax.topology.graph import Graph, check_connected, shortest_paths

_ROOTS = 48  # that candidates are rooted at
_MOST = 1100  # vertices: all pairs are looked at for each candidate
_SLACK = 1e-9


@dataclass(frozen=True, eq=False, kw_only=True)
class TreeCover:
    """Rooted spanning trees; a root is its own parent."""

    parents: np.ndarray  # (trees, vertices)
    stretch: float  # the worst of any pair's best tree

    @property
    def size(self) -> int:
        """Return how many trees there are."""
        return len(self.parents)

    def link_load(self) -> float:
        """Return the payloads on the most loaded link where each tree broadcasts a
        share of one from its root.
        """  # noqa: D205
        used = Counter(
            (int(parent), vertex)
            for row in self.parents
            for vertex, parent in enumerate(row.tolist())
            if parent != vertex
        )
        return max(used.values(), default=0) / self.size


def cover(graph: Graph, *, eps: float) -> TreeCover:
    """Return spanning trees in which each pair is within 1 + eps of its distance.

    Raises:
      ConfigError: eps below zero, a graph in parts, or one that is too large.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ConfigError(f"eps is {shown(eps)}; it must be 0 or more")
    check_connected(graph)
    if graph.size > _MOST:
        raise ConfigError(
            f"a tree cover looks at all pairs, and {graph.size} vertices have too many;"
            f" use at most {_MOST}, or oracle.forests"
        )
    table = graph.distances
    limit = table * (1 + eps) + _SLACK * (1 + table)
    tried = list(_candidates(graph))
    # A bit for each pair: does the tree keep it?
    kept = [np.packbits(tree_distances(graph, tree) <= limit) for tree in tried]
    size = graph.size
    left = np.packbits(~np.eye(size, dtype=bool))
    chosen = []
    while left.any():
        gains = [int(np.bitwise_count(left & bits).sum()) for bits in kept]
        best = int(np.argmax(gains))
        pairs = np.unpackbits(left, count=size * size).reshape(size, size)
        # A tree of shortest paths from an end keeps all of that end's pairs.
        ends = pairs.sum(axis=1)
        if gains[best] <= int(ends.max()):
            tree = path_tree(graph, int(np.argmax(ends)), min)
            chosen.append(tree)
            left = left & ~np.packbits(tree_distances(graph, tree) <= limit)
        else:
            chosen.append(tried[best])
            left = left & ~kept[best]
    chosen = chosen or [path_tree(graph, 0, min)]
    return TreeCover(parents=np.array(chosen), stretch=_stretch(graph, chosen))


def _stretch(graph: Graph, trees: list[np.ndarray]) -> float:
    if graph.size < 2:
        return 1.0
    best = np.minimum.reduce([tree_distances(graph, tree) for tree in trees])
    apart = ~np.eye(graph.size, dtype=bool)
    return float((best[apart] / graph.distances[apart]).max())


def _candidates(graph: Graph) -> Iterator[np.ndarray]:
    """Yield trees of shortest paths from roots far apart, one for each rule for ties.

    Where vertices have places, steps along one of the dimensions go first: combs.
    """
    rules: list[Callable[[int, list[int]], int]] = [
        lambda vertex, before: min(before),
        lambda vertex, before: max(before),
    ]
    places = graph.places
    for axis in range(0 if places is None else places.shape[1]):

        def along(vertex: int, before: list[int], axis: int = axis) -> int:
            assert places is not None
            moved = [places[b][axis] != places[vertex][axis] for b in before]
            return max(zip(moved, before, strict=True))[1]

        rules.append(along)
    for root in spread_out(graph, _ROOTS):
        for rule in rules:
            yield _tree(graph, root, rule)


def spread_out(graph: Graph, count: int) -> list[int]:
    """Return vertices far from each other: each the farthest from those before it."""
    table = graph.distances
    chosen = [int(np.argmin(table.max(axis=1)))]
    apart = table[chosen[0]].copy()
    while len(chosen) < min(count, graph.size):
        chosen.append(int(np.argmax(apart)))
        apart = np.minimum(apart, table[chosen[-1]])
    return chosen


def path_tree(graph: Graph, root: int, tie: Callable[[list[int]], int]) -> np.ndarray:
    """Return the parents of a tree of shortest paths from a root."""
    return _tree(graph, root, lambda vertex, before: tie(before))


def _tree(graph: Graph, root: int, rule: Callable[[int, list[int]], int]) -> np.ndarray:
    lengths = shortest_paths(graph, [root])[0]
    parents = np.full(graph.size, root)
    for vertex, length in lengths.items():
        if vertex != root:
            slack = _SLACK * (1 + length)
            parents[vertex] = rule(
                vertex,
                [
                    other
                    for other, weight in graph.links[vertex]
                    if lengths[other] < length
                    and abs(lengths[other] + weight - length) <= slack
                ],
            )
    return parents


def tree_distances(graph: Graph, parents: np.ndarray) -> np.ndarray:
    """Return the distances between all pairs along one spanning tree."""
    found = np.zeros((graph.size, graph.size))
    done: list[int] = []
    for vertex in from_the_root(parents):
        parent = int(parents[vertex])
        if parent != vertex:
            weight = dict(graph.links[vertex])[parent]
            found[vertex, done] = found[parent, done] + weight
            found[done, vertex] = found[vertex, done]
        done.append(vertex)
    return found


def from_the_root(parents: np.ndarray) -> list[int]:
    """Return the vertices of a tree or forest, each after its parent."""
    children: list[list[int]] = [[] for _ in parents]
    queue = []
    for vertex, parent in enumerate(parents.tolist()):
        (queue if parent == vertex else children[parent]).append(vertex)
    for vertex in queue:
        queue.extend(children[vertex])
    return queue
