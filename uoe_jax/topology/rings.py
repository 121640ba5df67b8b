"""Orders of devices in which the neighbours on a mesh's axes are near each other.

Each axis of a mesh is a ring, weighted by the bytes that go round it. The cost of an
order is the sum over axes of weight times the mean distance between ring neighbours: a
quadratic assignment problem. It is built (digits of a box's coordinates, or a closed
walk folded into the mesh) and then searched from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uoe_jax.errors import ConfigError, divisors, shown
from uoe_jax.topology.boxes import box_order
from uoe_jax.topology.graph import Graph, check_connected, check_whole, is_finite
from uoe_jax.topology.search import improve_mesh, improve_ring, mean_hops
from uoe_jax.topology.walks import closed_walk, fold

_MOVES = 1000  # of the search, at most; fewer where a move takes long
_WORK = 4e8  # numbers that the search may touch, moves times vertices squared
_SEARCHED = 4096  # vertices; larger boxes are built only


@dataclass(frozen=True, eq=False, kw_only=True)
class RingOrder:
    """An order of devices: which vertex stands at each place of the mesh, and its cost.

    Hops count the lightest edge as 1; of an axis of one device they are 0. A load is
    how many messages cross the most loaded link, in one direction, when each device
    sends one to the next of its ring.
    """

    vertices: np.ndarray  # of the mesh's shape
    hops: tuple[float, ...]  # mean between ring neighbours, an axis each
    worst: tuple[float, ...]  # the longest
    loads: tuple[int, ...]

    def cost(self, traffic: Sequence[float]) -> float:
        """Return the mean hops of all axes, weighted by their traffic."""
        total = sum(traffic)
        if total == 0:
            return 0.0
        return sum(w * h for w, h in zip(traffic, self.hops, strict=True)) / total


def order_mesh(
    graph: Graph,
    shape: Sequence[int],
    traffic: Sequence[float] | None = None,
    *,
    start: np.ndarray | None = None,
    moves: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> RingOrder:
    """Return an order of a graph's vertices with short rings on each axis of a mesh.

    Args:
      graph: connected; every vertex is used once.
      shape: devices of each axis; the product is the number of vertices.
      traffic: bytes of each axis, all equal if not given. Only their ratios matter.
      start: an order of that shape, never worsened: jax's own, or 0, 1, 2, ...
      moves: steps of the search, 0 for none; a number that suits the size if not given.
      seconds: when the search ends at the latest. Results then depend on the machine.
      seed: of the search; the same arguments give the same order.

    Raises:
      ConfigError: a shape, traffic, start or seed that doesn't fit, a graph in parts.
    """
    shape, traffic = _checked(graph, shape, traffic)
    check_whole(seed, "seed")
    if seed < 0:
        raise ConfigError(f"seed is {shown(seed)}; it must not be negative")
    if start is None:
        start = np.arange(graph.size)
    elif sorted(np.ravel(start).tolist()) != list(range(graph.size)):
        raise ConfigError(
            f"start isn't an order of the {graph.size} devices; name each one once"
        )
    start = np.asarray(start, int).reshape(shape)
    if graph.size < 3 or graph.switched:
        return describe_order(graph, start)
    until = math.inf if seconds is None else time.monotonic() + seconds
    table = graph.distances / graph.least
    weigh = lambda order: float(np.dot(traffic, mean_hops(table, order)))
    candidates = [start, *_built(graph, shape, traffic, table, until)]
    best = min(candidates, key=weigh)
    searched = graph.size <= _SEARCHED
    if searched and weigh(best) > sum(_floors(shape, traffic)) + 1e-9:
        if moves is None:
            moves = int(min(_MOVES, _WORK / graph.size**2))
        best = improve_mesh(table, best, traffic, moves, until, seed)
    return describe_order(graph, best)


def describe_order(graph: Graph, order: np.ndarray) -> RingOrder:
    """Return an order with its hops and loads."""
    table = graph.distances / graph.least
    hops, worst, loads = [], [], []
    for axis, size in enumerate(order.shape):
        after = np.roll(order, -1, axis)
        lengths = table[order, after]
        hops.append(float(lengths.mean()) if size > 1 else 0.0)
        worst.append(float(lengths.max()) if size > 1 else 0.0)
        pairs = np.stack([order, after], -1).reshape(-1, 2) if size > 1 else []
        loads.append(most_loaded(graph, pairs))
    return RingOrder(
        vertices=order, hops=tuple(hops), worst=tuple(worst), loads=tuple(loads)
    )


def most_loaded(graph: Graph, pairs: Sequence[Sequence[int]] | np.ndarray) -> int:
    """Return the messages on the most loaded link, each pair sending one.

    A message takes a shortest path, at each vertex the lowest neighbour on one.
    """
    table, crossed = graph.distances, {}
    slack = 1e-6 * graph.least
    for u, v in np.asarray(pairs, int).reshape(-1, 2).tolist():
        while u != v:
            left = table[u, v]
            step = next(
                w
                for w, weight in graph.links[u]
                if abs(weight + table[w, v] - left) <= slack + 1e-6 * left
            )
            crossed[u, step] = crossed.get((u, step), 0) + 1
            u = step
    return max(crossed.values(), default=0)


def _checked(
    graph: Graph, shape: Sequence[int], traffic: Sequence[float] | None
) -> tuple[tuple[int, ...], list[float]]:
    check_connected(graph)
    for size in shape:
        check_whole(size, "an axis of the mesh")
    shape = tuple(int(size) for size in shape)
    if min(shape, default=1) < 1 or math.prod(shape) != graph.size:
        text = " x ".join(map(str, shape))
        raise ConfigError(
            f"mesh {text} isn't the {graph.size} devices of the graph; use axes whose "
            f"product is {graph.size}, of {divisors(graph.size)}"
        )
    given = [1.0] * len(shape) if traffic is None else list(traffic)
    if len(given) != len(shape):
        raise ConfigError(
            f"traffic has {len(given)} numbers and the mesh {len(shape)} axes; give "
            "one number for each axis"
        )
    for number in given:
        if not (is_finite(number) and number >= 0):
            raise ConfigError(
                f"traffic of an axis is {shown(number)}; it must be a finite number of "
                "bytes, 0 or more"
            )
    return shape, given


def _floors(shape: Sequence[int], traffic: Sequence[float]) -> list[float]:
    """Return the least that each axis can cost: a hop between any two neighbours."""
    return [w if size > 1 else 0.0 for size, w in zip(shape, traffic, strict=True)]


def _built(
    graph: Graph,
    shape: tuple[int, ...],
    traffic: Sequence[float],
    table: np.ndarray,
    until: float,
) -> list[np.ndarray]:
    found = []
    if graph.box is not None:
        # Where nothing is counted, an axis still counts a little.
        weights = [max(w, 1e-6 * max(*traffic, 1e-300)) for w in traffic]
        dealt = box_order(graph.box, shape, weights)
        if dealt is not None:
            found.append(dealt)
        if len(shape) > 1 or dealt is not None:
            return found
    if graph.size <= _SEARCHED:
        walk = closed_walk(graph, table)
        found.append(fold(improve_ring(table, walk, until=until), shape))
    return found
