"""Shortcut partitions: clusters of small diameter that short paths cross few of.

Chang et al. 2024 (arXiv 2308.00555), from a buffered cop decomposition: points are
spread over each supernode's skeleton, and vertices go to the nearest one inside it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from uoe_jax.errors import ConfigError, shown
from uoe_jax.topology.cops import CopDecomposition, decompose
from uoe_jax.topology.graph import Graph, is_finite, shortest_paths


@dataclass(frozen=True, eq=False, kw_only=True)
class Partition:
    """Clusters by number; any two vertices of one are joined inside it.

    A path inside a cluster takes at most `eps` times the graph's diameter, as long as
    supernodes keep to their radius. `note` says what doesn't hold, "" if all does.
    """

    cluster: np.ndarray  # of each vertex
    centers: tuple[int, ...]
    eps: float
    diameter: float
    cops: CopDecomposition
    note: str

    @property
    def size(self) -> int:
        """Return how many clusters there are."""
        return len(self.centers)

    def members(self) -> list[list[int]]:
        """Return the vertices of each cluster, ascending."""
        found: list[list[int]] = [[] for _ in self.centers]
        for vertex, cluster in enumerate(self.cluster.tolist()):
            found[cluster].append(vertex)
        return found


def partition(
    graph: Graph, *, eps: float, r: int = 8, diameter: float | None = None
) -> Partition:
    """Return the shortcut partition of a graph without a K_r minor.

    Args:
      graph: any; its parts are taken one after the other.
      eps: largest diameter of a cluster, over the graph's.
      r: 3 for trees, 4 for series-parallel graphs, 5 for planar ones, 8 for tori,
        t + 2 for treewidth t. If it is too low, `note` says so and names the minor.
      diameter: the graph's, measured if not given.

    Raises:
      ConfigError: eps that isn't above zero, or r below 3.
    """
    if not (is_finite(eps) and eps > 0):
        raise ConfigError(f"eps is {shown(eps)}; it must be a positive number")
    if diameter is None:
        diameter = measure_diameter(graph)
    radius = eps * diameter / 4 or graph.least
    cops = decompose(graph, radius=radius, r=r)
    cluster, centers = np.full(graph.size, -1), []
    for members, skeleton in zip(cops.members(), cops.skeletons, strict=True):
        inside = set(members)
        net = _net(graph, [vertex for vertex, _ in skeleton], radius)
        number = {point: len(centers) + place for place, point in enumerate(net)}
        centers.extend(net)
        along = _nearest(graph, net, {vertex for vertex, _ in skeleton})
        _, before = shortest_paths(graph, along, inside)
        for vertex, last in before.items():
            if vertex == last:
                cluster[vertex] = number[along[vertex]]
            else:
                cluster[vertex] = cluster[last]
    return Partition(
        cluster=cluster,
        centers=tuple(centers),
        eps=eps,
        diameter=diameter,
        cops=cops,
        note=_note(graph, cops),
    )


def measure_diameter(graph: Graph) -> float:
    """Return the longest of the shortest paths, of all parts."""
    if graph.size == 0:
        return 0.0
    if graph.box is not None:
        pairs = zip(graph.box.sides, graph.box.rings, strict=True)
        return float(sum(ring // 2 if ring else side - 1 for side, ring in pairs))
    return max(
        max(shortest_paths(graph, [vertex])[0].values()) for vertex in range(graph.size)
    )


def _net(graph: Graph, skeleton: list[int], radius: float) -> list[int]:
    """Return points of a skeleton that are more than a radius apart along it.

    Each point of the skeleton is within a radius of one.
    """
    inside, left, net = set(skeleton), set(skeleton), []
    for vertex in sorted(skeleton):
        if vertex in left:
            net.append(vertex)
            left -= shortest_paths(graph, [vertex], inside, radius)[0].keys()
    return net


def _nearest(graph: Graph, net: list[int], inside: set[int]) -> dict[int, int]:
    """Return the nearest point of a net for each vertex of a skeleton."""
    _, before = shortest_paths(graph, net, inside)
    found: dict[int, int] = {}
    for vertex, last in before.items():
        found[vertex] = vertex if vertex == last else found[last]
    return found


def _note(graph: Graph, cops: CopDecomposition) -> str:
    if cops.width > cops.r - 1:
        return (
            f"r is too low: {cops.width} supernodes touch each other pairwise, so the "
            f"graph contains K_{cops.width}; use r {cops.width + 1}"
        )
    if cops.radius / cops.r < graph.least:
        return (
            f"no supernode grows: a buffer of {cops.radius / cops.r:.3g} is less than "
            f"the lightest edge, {graph.least:.3g}; supernodes are bare paths"
        )
    return ""


def cluster_links(graph: Graph, found: Partition) -> list[set[int]]:
    """Return the clusters next to each cluster."""
    beside: list[set[int]] = [set() for _ in found.centers]
    for u, v, _ in graph.edges():
        a, b = int(found.cluster[u]), int(found.cluster[v])
        if a != b:
            beside[a].add(b)
            beside[b].add(a)
    return beside


def hops_along(beside: list[set[int]], met: list[int]) -> int:
    """Return the hops from the first to the last of the clusters that a path meets.

    Only those clusters may be passed through.
    """
    allowed, goal = set(met), met[-1]
    queue, hops = deque([met[0]]), {met[0]: 0}
    while goal not in hops:
        here = queue.popleft()
        for other in sorted(beside[here] & allowed):
            if other not in hops:
                hops[other] = hops[here] + 1
                queue.append(other)
    return hops[goal]


def worst_hops(graph: Graph, found: Partition, sources: list[int]) -> float:
    """Return the most hops of any pair from these sources, over what its length allows.

    That is the h of an (eps, h)-shortcut partition, times eps: hops divided by
    ceil(length / (eps diameter)), along one shortest path of each pair.
    """
    beside, worst = cluster_links(graph, found), 0.0
    unit = found.eps * found.diameter
    for source in sources:
        lengths, before = shortest_paths(graph, [source])
        met: dict[int, list[int]] = {}
        for vertex, length in lengths.items():
            here = int(found.cluster[vertex])
            path = met[before[vertex]] if vertex != source else [here]
            met[vertex] = path if path[-1] == here else [*path, here]
            if vertex != source:
                units = math.ceil(length / unit - 1e-9)
                worst = max(worst, hops_along(beside, met[vertex]) / units)
    return worst
