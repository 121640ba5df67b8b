"""Buffered cop decompositions of weighted graphs without a large clique minor.

Chang, Conroy, Le, Milenkovic, Solomon, Than 2024, "Shortcut Partitions in Minor-Free
Graphs" (arXiv 2308.00555). Supernodes are connected sets around a skeleton, a tree of
shortest paths of what was left of the graph when it was made. In a graph without a
K_r minor a supernode lies within `radius` of its skeleton, touches at most r - 2 of its
ancestors, and keeps `radius / r` away from ancestors that its part has left behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from uoe_jax.errors import ConfigError, shown
from uoe_jax.topology.graph import Graph, shortest_paths, split_components


@dataclass(frozen=True, eq=False, kw_only=True)
class CopDecomposition:
    """Supernodes by number, a parent before its children; -1: no parent.

    `minor` are supernodes that touch each other pairwise, contracted to vertices: more
    than r - 1 of them prove that the graph has that clique as a minor.
    """

    radius: float
    r: int
    owner: tuple[int, ...]  # of each vertex
    parents: tuple[int, ...]
    skeletons: tuple[tuple[tuple[int, int], ...], ...]  # (vertex, the one before it)
    domains: tuple[frozenset[int], ...]  # the part of the graph a skeleton was made in
    bags: tuple[tuple[int, ...], ...]  # the supernode, and ancestors that its part saw
    minor: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return how many supernodes there are."""
        return len(self.parents)

    @property
    def width(self) -> int:
        """Return the size of the largest bag."""
        return max(map(len, self.bags), default=0)

    def members(self) -> list[list[int]]:
        """Return the vertices of each supernode, ascending."""
        found: list[list[int]] = [[] for _ in self.parents]
        for vertex, owner in enumerate(self.owner):
            found[owner].append(vertex)
        return found

    def ancestors(self, number: int) -> list[int]:
        """Return the supernodes above one, its parent first."""
        found = []
        while (number := self.parents[number]) >= 0:
            found.append(number)
        return found


def decompose(graph: Graph, *, radius: float, r: int) -> CopDecomposition:
    """Return the buffered cop decomposition, always the same for the same graph.

    Where `radius / r` is less than the lightest edge nothing grows: supernodes are
    bare skeletons.

    Raises:
      ConfigError: a radius that isn't a positive number, or r below 3.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ConfigError(
            f"the radius of supernodes is {shown(radius)}; it must be positive"
        )
    if isinstance(r, bool) or not isinstance(r, int) or r < 3:
        raise ConfigError(
            f"r is {shown(r)}; a tree has no K_3 minor, use 3 for one, 5 for a planar "
            "graph, 8 for a torus"
        )
    build = _Build(graph, radius / r)
    stack = [(part, -1) for part in reversed(graph.components())]
    while stack:
        part, parent = stack.pop()
        stack.extend(reversed(build.supernode(part, parent)))
    bags = tuple(build.bags)
    return CopDecomposition(
        radius=radius,
        r=r,
        owner=tuple(build.owner),
        parents=tuple(build.parents),
        skeletons=tuple(build.skeletons),
        domains=tuple(build.domains),
        bags=bags,
        minor=max(bags, key=len, default=()),
    )


class _Build:
    """The decomposition under way; vertices of supernodes yet to come have no owner."""

    def __init__(self, graph: Graph, buffer: float) -> None:
        self.graph, self.buffer = graph, buffer
        self.owner = [-1] * graph.size
        self.parents: list[int] = []
        self.skeletons: list[tuple[tuple[int, int], ...]] = []
        self.domains: list[frozenset[int]] = []
        self.bags: list[tuple[int, ...]] = []

    def supernode(self, part: list[int], parent: int) -> list[tuple[list[int], int]]:
        """Make the supernode of a part; return the parts that are left, with parents.

        Its skeleton joins one neighbour of each supernode that the part sees.
        """
        seen = self._seen(part)
        ends = [seen[number] for number in sorted(seen)] or [part[0]]
        inside = set(part)
        before = shortest_paths(self.graph, [ends[0]], inside)[1]
        skeleton = {ends[0]: ends[0]}
        for vertex in ends[1:]:
            while vertex not in skeleton:
                skeleton[vertex] = before[vertex]
                vertex = before[vertex]
        new = len(self.parents)
        for vertex in skeleton:
            self.owner[vertex] = new
        self.parents.append(parent)
        self.skeletons.append(tuple(sorted(skeleton.items())))
        self.domains.append(frozenset(inside))
        self.bags.append((*sorted(seen), new))
        left = []
        for rest in split_components(self.graph, inside - skeleton.keys()):
            cut = sorted(seen.keys() - self._seen(rest).keys())
            left.extend((grown, new) for grown in self._grow(rest, cut))
        return left

    def _seen(self, part: Iterable[int]) -> dict[int, int]:
        """Return the supernodes next to a part, and the part's first vertex at each."""
        found: dict[int, int] = {}
        for vertex in part:
            for other, _ in self.graph.links[vertex]:
                owner = self.owner[other]
                if owner >= 0 and vertex < found.get(owner, self.graph.size):
                    found[owner] = vertex
        return found

    def _grow(self, part: list[int], cut: list[int]) -> list[list[int]]:
        """Return what is left of a part once its walls to lost supernodes have grown.

        For each supernode that the part has just left behind, what lies between takes
        the vertices within the buffer.
        """
        done, stack = [], [(part, cut)]
        while stack:
            part, cut = stack.pop()
            if not cut:
                done.append(part)
                continue
            lost, *rest = cut
            inside = set(part)
            wall, before_seen = self._wall(part, lost), self._seen(part).keys()
            # A supernode that has grown back to the part isn't lost any more.
            if not wall or lost in before_seen:
                stack.append((part, rest))
                continue
            # Walls keep their owners; what is reached joins that of its nearest source.
            found, before = shortest_paths(
                self.graph, wall, inside | set(wall), self.buffer
            )
            for vertex in found:
                if vertex in inside:
                    self.owner[vertex] = self.owner[before[vertex]]
            for left in split_components(self.graph, inside - found.keys()):
                gone = before_seen - self._seen(left).keys() - set(rest)
                stack.append((left, rest + sorted(gone)))
        return sorted(done)

    def _wall(self, part: list[int], lost: int) -> list[int]:
        """Return the vertices beside a part that a lost supernode can reach it through.

        All of its domain: its descendants', and what ancestors have grown into.
        """
        domain = self.domains[lost]
        inside = set(part)
        return sorted(
            {
                other
                for vertex in part
                for other, _ in self.graph.links[vertex]
                if other in domain and other not in inside
            }
        )
