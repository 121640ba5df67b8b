"""Distances from trees in constant time and linear space: the least over the trees.

In a tree a distance is two depths less that of the lowest common ancestor, which takes
a few integer operations (Schieber and Vishkin 1988, "On finding lowest common
ancestors"): no table grows faster than the number of vertices.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from uoe_jax.errors import ConfigError, shown
from uoe_jax.topology.graph import Graph, shortest_paths
from uoe_jax.topology.trees import from_the_root

_BATCH = 1 << 16  # pairs asked at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tree:
    """A tree or forest, ready for lowest common ancestors; all of one number each."""

    label: np.ndarray  # of the path that a vertex is on
    above: np.ndarray  # bits of the paths above
    head: np.ndarray  # the first vertex of a path, by label
    parent: np.ndarray
    depth: np.ndarray  # distance from the root, float32
    level: np.ndarray  # edges from the root
    root: np.ndarray  # of each vertex


@dataclass(frozen=True, eq=False, kw_only=True)
class Oracle:
    """Upper bounds of distances: the least over trees that both vertices are in."""

    trees: tuple[_Tree, ...]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tables."""
        return sum(
            getattr(tree, name).nbytes
            for tree in self.trees
            for name in tree.__dataclass_fields__
        )

    def distances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return a distance for each pair; inf where no tree has both."""
        first, second = np.asarray(first), np.asarray(second)
        found = np.full(first.shape, np.inf, np.float32)
        for start in range(0, len(first), _BATCH):
            part = slice(start, start + _BATCH)
            for tree in self.trees:
                lengths = _tree_lengths(tree, first[part], second[part])
                np.minimum(found[part], lengths, out=found[part])
        return found


def make_oracle(graph: Graph, parents: np.ndarray) -> Oracle:
    """Return the oracle of trees or forests, (trees, vertices) parents; roots their own.

    Raises:
      ConfigError: a parent that isn't a neighbour, or parents in a circle.
    """  # noqa: E501
    return Oracle(trees=tuple(_prepare(graph, row) for row in np.atleast_2d(parents)))


def _prepare(graph: Graph, parents: np.ndarray) -> _Tree:
    order = from_the_root(parents)
    if len(order) < graph.size:
        raise ConfigError("the parents go round in a circle; a tree has a root")
    size = graph.size
    depth, level = np.zeros(size), np.zeros(size, np.int32)
    root = np.arange(size, dtype=np.int32)
    weight = np.ones(size, np.int64)
    for vertex in order:
        parent = int(parents[vertex])
        if parent != vertex:
            length = dict(graph.links[vertex]).get(parent)
            if length is None:
                raise ConfigError(
                    f"{vertex}'s parent {parent} isn't its neighbour; use a tree of "
                    "the graph's edges"
                )
            depth[vertex] = depth[parent] + length
            level[vertex] = level[parent] + 1
            root[vertex] = root[parent]
    for vertex in reversed(order):
        if parents[vertex] != vertex:
            weight[parents[vertex]] += weight[vertex]
    first = _preorder(order, parents, weight)
    # The number of most trailing zeros among those of a subtree, first ... last.
    last = first + weight - 1
    shift = _top_bit((first - 1) ^ last)
    label = ((last >> shift) << shift).astype(np.int32)
    above, head = np.zeros(size, np.int32), np.zeros(size + 1, np.int32)
    for vertex in order:
        parent = int(parents[vertex])
        low = int(label[vertex]) & -int(label[vertex])
        if parent == vertex:
            above[vertex] = low
            head[label[vertex]] = vertex
        elif label[parent] == label[vertex]:
            above[vertex] = above[parent]
        else:
            above[vertex] = above[parent] | low
            head[label[vertex]] = vertex
    return _Tree(
        label=label,
        above=above,
        head=head,
        parent=parents.astype(np.int32),
        depth=depth.astype(np.float32),
        level=level,
        root=root,
    )


def _preorder(order: list[int], parents: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return each vertex's number in a walk down the trees, from 1."""
    first, free = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    base = 1
    for vertex in order:
        parent = int(parents[vertex])
        if parent == vertex:
            first[vertex], base = base, base + int(weight[vertex])
        else:
            first[vertex] = free[parent]
            free[parent] += weight[vertex]
        free[vertex] = first[vertex] + 1
    return first


def _top_bit(number: np.ndarray) -> np.ndarray:
    """Return the place of the highest bit that is set; numbers from 1."""
    return np.frexp(number.astype(np.float64))[1].astype(np.int64) - 1


def _tree_lengths(tree: _Tree, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the distances in one tree; inf for vertices of different ones."""
    a, b = tree.label[u].astype(np.int64), tree.label[v].astype(np.int64)
    apart = a ^ b
    high = np.where(apart > 0, _top_bit(np.maximum(apart, 1)), 0)
    common = tree.above[u] & tree.above[v] & -(1 << high)
    common = np.maximum(common, 1)
    low = common & -common
    # The path that the ancestor is on, and where each side's way up enters it.
    target = (a & -(low << 1)) | low
    target = np.where(apart > 0, target, a)
    x, y = _enter(tree, u, a, target, low), _enter(tree, v, b, target, low)
    ancestor = np.where(tree.level[x] <= tree.level[y], x, y)
    length = tree.depth[u] + tree.depth[v] - 2 * tree.depth[ancestor]
    return np.where(tree.root[u] == tree.root[v], np.maximum(length, 0), np.inf)


def _enter(
    tree: _Tree,
    vertex: np.ndarray,
    label: np.ndarray,
    target: np.ndarray,
    low: np.ndarray,
) -> np.ndarray:
    """Return the first vertex on a path of some label, going up from each vertex."""
    below = tree.above[vertex] & (low - 1)
    bit = np.int64(1) << np.where(below > 0, _top_bit(np.maximum(below, 1)), 0)
    entry = (label & -(bit << 1)) | bit
    inside = np.where(entry < len(tree.head), entry, 0)
    return np.where(label == target, vertex, tree.parent[tree.head[inside]])


def forests(
    graph: Graph, *, landmarks: int = 12, copies: int = 4, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield forests for an oracle of a graph with very many vertices.

    Trees of shortest paths from landmarks, for far pairs; and at each scale, twice as
    large as the one before, clusters grown from all vertices at once after random
    waits (Miller, Peng, Xu 2013), a tree of shortest paths in each.

    Raises:
      ConfigError: no landmark.
    """
    if landmarks < 1:
        raise ConfigError(f"landmarks is {shown(landmarks)}; use at least 1")
    random = np.random.default_rng(seed)
    span = 0.0
    for root in random.choice(graph.size, min(landmarks, graph.size), replace=False):
        lengths, before = shortest_paths(graph, [int(root)])
        span = max(span, *lengths.values())
        yield _parents(graph.size, before)
    scale = 4 * float(np.median([w for _, _, w in graph.edges()] or [1.0]))
    while scale < span:
        for _ in range(copies):
            yield _clusters(graph, random.exponential(scale, graph.size))
        scale *= 2


def _parents(size: int, before: dict[int, int]) -> np.ndarray:
    found = np.arange(size)
    for vertex, last in before.items():
        found[vertex] = last
    return found


def _clusters(graph: Graph, waits: np.ndarray) -> np.ndarray:
    """Return trees of the clusters: each vertex joins whoever comes first.

    A vertex sets out as early as its wait is long.
    """
    found = np.full(graph.size, -1)
    early = waits.max() - waits
    queue = [(float(time), v, v) for v, time in enumerate(early.tolist())]
    heapq.heapify(queue)
    while queue:
        time, last, vertex = heapq.heappop(queue)
        if found[vertex] >= 0:
            continue
        found[vertex] = last
        for other, weight in graph.links[vertex]:
            if found[other] < 0:
                heapq.heappush(queue, (time + weight, vertex, other))
    return found
