"""Which properties of its theorem a decomposition or partition has, measured."""

from __future__ import annotations

import numpy as np

from uoe_jax.topology.cops import CopDecomposition
from uoe_jax.topology.graph import Graph, shortest_paths, split_components
from uoe_jax.topology.shortcut import Partition

_SLACK = 1e-9  # of the largest length


def broken_properties(graph: Graph, cops: CopDecomposition) -> list[str]:
    """Return what a buffered cop decomposition of this graph doesn't keep, [] if none.

    "radius", "skeleton", "leaves", "edges", "bags", "buffer" and "connected" of the
    definition in Chang et al. 2024.
    """
    found = []
    if not _radius_holds(graph, cops):
        found.append("radius")
    if not _skeletons_hold(graph, cops):
        found.append("skeleton")
    if any(_leaves(skeleton) > cops.r - 1 for skeleton in cops.skeletons):
        found.append("leaves")
    ancestors = [{number, *cops.ancestors(number)} for number in range(cops.count)]
    owner = cops.owner
    if any(
        owner[u] not in ancestors[owner[v]] and owner[v] not in ancestors[owner[u]]
        for u, v, _ in graph.edges()
    ):
        found.append("edges")
    if cops.width > cops.r - 1:
        found.append("bags")
    if not _buffer_holds(graph, cops):
        found.append("buffer")
    if any(len(split_components(graph, m)) != 1 for m in cops.members()):
        found.append("connected")
    return found


def _radius_holds(graph: Graph, cops: CopDecomposition) -> bool:
    """Whether each vertex is within the radius of its skeleton inside its supernode."""
    return radius_share(graph, cops) <= 1 + _SLACK


def radius_share(graph: Graph, cops: CopDecomposition) -> float:
    """Return how far a vertex is from its skeleton at most, over the radius allowed."""
    worst = 0.0
    for members, skeleton in zip(cops.members(), cops.skeletons, strict=True):
        inside = set(members)
        lengths = shortest_paths(graph, [v for v, _ in skeleton], inside)[0]
        if len(lengths) < len(inside):
            return float("inf")
        worst = max(worst, max(lengths.values()))
    return worst / cops.radius


def _leaves(skeleton: tuple[tuple[int, int], ...]) -> int:
    inner = {before for vertex, before in skeleton if vertex != before}
    return sum(vertex not in inner for vertex, _ in skeleton)


def _skeletons_hold(graph: Graph, cops: CopDecomposition) -> bool:
    """Whether each skeleton's paths from its root are shortest in its domain."""
    for skeleton, domain in zip(cops.skeletons, cops.domains, strict=True):
        before = dict(skeleton)
        (root,) = (vertex for vertex, last in skeleton if vertex == last)
        lengths = shortest_paths(graph, [root], domain)[0]
        for vertex, last in before.items():
            if vertex == last:
                continue
            weight = dict(graph.links[vertex]).get(last, np.inf)
            slack = _SLACK * (1 + lengths[vertex])
            if last not in before:
                return False
            if abs(lengths[last] + weight - lengths[vertex]) > slack:
                return False
    return True


def _buffer_holds(graph: Graph, cops: CopDecomposition) -> bool:
    """Whether supernodes that don't touch an ancestor are a buffer away from it."""
    members, beside = cops.members(), [set() for _ in range(cops.count)]
    for u, v, _ in graph.edges():
        beside[cops.owner[u]].add(cops.owner[v])
        beside[cops.owner[v]].add(cops.owner[u])
    below: list[list[int]] = [[] for _ in members]
    for number in range(cops.count):
        for above in cops.ancestors(number):
            if above not in beside[number]:
                below[above].append(number)
    buffer = cops.radius / cops.r * (1 - _SLACK)
    for above, far in enumerate(below):
        if not far:
            continue
        near = shortest_paths(graph, members[above], cops.domains[above], buffer)[0]
        if any(vertex in near for number in far for vertex in members[number]):
            return False
    return True


def broken_partition(graph: Graph, found: Partition) -> list[str]:
    """Return what a shortcut partition doesn't keep: "covers", "connected", "diameter".

    The diameter is strong: of each cluster by itself.
    """
    broken = []
    if graph.size and not (
        found.cluster.min() >= 0 and found.cluster.max() < found.size
    ):
        broken.append("covers")
    clusters = [part for part in found.members() if part]
    if len(clusters) < found.size:
        broken.append("covers")
    if any(len(split_components(graph, part)) > 1 for part in clusters):
        broken.append("connected")
    elif strong_diameter(graph, found) > found.eps * found.diameter * (1 + _SLACK):
        broken.append("diameter")
    return broken


def strong_diameter(graph: Graph, found: Partition) -> float:
    """Return the largest distance inside a cluster, by paths inside it."""
    worst = 0.0
    for part in found.members():
        inside = set(part)
        for vertex in part if len(part) > 1 else []:
            worst = max(worst, *shortest_paths(graph, [vertex], inside)[0].values())
    return worst
