"""A closed walk over any graph, built by clusters, and its folding into a mesh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uoe_jax.topology.cops import decompose
from uoe_jax.topology.graph import Graph


def closed_walk(graph: Graph, table: np.ndarray) -> np.ndarray:
    """Return an order of all vertices with short steps, the last next to the first.

    Vertices are taken supernode by supernode of the cop decomposition, children after
    parents, and put in where they lengthen the walk least. `table` are distances.
    """
    radius = float(table.max()) / 8
    cops = decompose(graph, radius=radius, r=8)
    children: list[list[int]] = [[] for _ in cops.parents]
    for number, parent in enumerate(cops.parents):
        if parent >= 0:
            children[parent].append(number)
    members = cops.members()
    queue = [n for n, parent in enumerate(cops.parents) if parent < 0][::-1]
    walk: list[int] = []
    while queue:
        here = queue.pop()
        for vertex in members[here]:
            _put_in(walk, vertex, table)
        queue.extend(reversed(children[here]))
    return np.array(walk, int)


def _put_in(walk: list[int], vertex: int, table: np.ndarray) -> None:
    """Put a vertex in where a closed walk gets longer by the least."""
    if len(walk) < 2:
        walk.append(vertex)
        return
    at = np.array(walk)
    after = np.roll(at, -1)
    longer = table[at, vertex] + table[vertex, after] - table[at, after]
    walk.insert(int(np.argmin(longer)) + 1, vertex)


def fold(walk: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return a walk laid to and fro over a mesh, the last axis running fastest.

    Steps of the walk stay steps along an axis, as in a reflected Gray code.
    """
    order = np.array(walk, int)
    for axis in range(len(shape) - 1, 0, -1):
        inner = tuple(shape[axis:])
        order = order.reshape(-1, *inner)
        order[1::2] = order[1::2, ::-1]
    return order.reshape(tuple(shape))
