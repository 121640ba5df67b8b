"""Small graphs of a large one's terminals: hosts of chips, groups of experts."""

from __future__ import annotations

import numpy as np

from uoe_jax.errors import ConfigError, shown
from uoe_jax.topology.graph import (
    Graph,
    check_connected,
    make_graph,
    shortest_paths,
)


def steiner(graph: Graph, terminals: list[int]) -> tuple[Graph, np.ndarray]:
    """Return a graph of the terminals only, and the terminal's place for each vertex.

    Each vertex joins the nearest terminal, so that regions are connected; neighbouring
    regions are joined by an edge as long as the way between their terminals (Steiner
    point removal by Voronoi regions). No distance gets shorter.

    Raises:
      ConfigError: a graph in parts, or terminals that aren't distinct vertices.
    """
    check_connected(graph)
    if len(set(terminals)) != len(terminals) or not terminals:
        raise ConfigError(
            f"terminals are {shown(terminals)}; name one vertex or several, each once"
        )
    for terminal in terminals:
        if not 0 <= terminal < graph.size:
            raise ConfigError(
                f"terminal {terminal} isn't there; use numbers from 0 to "
                f"{graph.size - 1}"
            )
    place = {terminal: number for number, terminal in enumerate(terminals)}
    region = np.full(graph.size, -1)
    for vertex, last in shortest_paths(graph, terminals)[1].items():
        region[vertex] = place[vertex] if vertex == last else region[last]
    pairs = {
        (min(a, b), max(a, b))
        for u, v, _ in graph.edges()
        if (a := int(region[u])) != (b := int(region[v]))
    }
    edges = []
    for first in sorted({a for a, _ in pairs}):
        lengths = shortest_paths(graph, [terminals[first]])[0]
        edges += [
            (first, b, lengths[terminals[b]]) for a, b in sorted(pairs) if a == first
        ]
    names = [graph.names[terminal] for terminal in terminals]
    return make_graph(len(terminals), edges, names), region
