"""The paper's objects keep what its theorems say, on random graphs."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.topology.weighted import graphs
from uoe_jax.errors import ConfigError
from uoe_jax.topology import (
    box_graph,
    cover,
    decompose,
    make_graph,
    make_oracle,
    partition,
    steiner,
)
from uoe_jax.topology.graph import Graph, shortest_paths, split_components
from uoe_jax.topology.oracle import forests
from uoe_jax.topology.shortcut import cluster_links, hops_along, worst_hops
from uoe_jax.topology.trees import from_the_root, path_tree, tree_distances
from uoe_jax.topology.verify import (
    broken_partition,
    broken_properties,
    radius_share,
    strong_diameter,
)


@st.composite
def trees(draw):
    size = draw(st.integers(1, 40))
    weight = st.floats(0.125, 8, width=16)
    edges = [(draw(st.integers(0, v - 1)), v, draw(weight)) for v in range(1, size)]
    return make_graph(size, edges)


@st.composite
def meshes(draw):
    """Planar grids with weights, some chips dead."""
    sides = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    grid = box_graph(sides, (0, 0))
    weight = st.floats(0.125, 8, width=16)
    graph = make_graph(grid.size, [(u, v, draw(weight)) for u, v, _ in grid.edges()])
    dead = draw(st.sets(st.integers(0, grid.size - 1), max_size=grid.size // 6))
    return graph.without(dead)[0] if len(dead) < grid.size else graph


@settings(max_examples=40, deadline=None)
@given(trees(), st.floats(0.05, 2))
def test_trees_have_bags_of_two(graph, share):
    radius = float(share * max(graph.distances.max(), 1))
    cops = decompose(graph, radius=radius, r=3)
    assert broken_properties(graph, cops) == [] and cops.width <= 2


@settings(max_examples=40, deadline=None)
@given(meshes(), st.floats(0.1, 2))
def test_planar_graphs_keep_every_property(graph, eps):
    found = partition(graph, eps=eps, r=5, diameter=_diameter(graph))
    assert broken_properties(graph, found.cops) == []
    assert broken_partition(graph, found) == []
    assert radius_share(graph, found.cops) <= 1
    again = partition(graph, eps=eps, r=5, diameter=_diameter(graph))
    assert np.array_equal(again.cluster, found.cluster)


def _diameter(graph):
    return float(graph.distances[np.isfinite(graph.distances)].max())


@settings(max_examples=40, deadline=None)
@given(graphs(connected=False))
def test_any_graph_keeps_all_but_the_bags(graph):
    """A bag that is too large names a clique minor: its supernodes touch pairwise."""
    cops = decompose(graph, radius=3.0, r=4)
    broken = broken_properties(graph, cops)
    assert set(broken) <= {"bags", "leaves"}
    assert ("bags" in broken) == (cops.width > 3)
    wide = decompose(graph, radius=3.0, r=30)
    assert broken_properties(graph, wide) == []


@pytest.mark.parametrize("seed", [14, 17, 56, 121, *range(4)])
def test_ancestors_that_grew_are_walls_too(seed):
    """The first four lose the buffer where only descendants count as walls."""
    rng = random.Random(seed)
    edges = [(0, 1)]
    for v in range(2, 60):
        u, w = rng.choice(edges)
        edges += [(u, v), (w, v)]
    graph = make_graph(60, [(u, v, 10 ** rng.uniform(-1, 1)) for u, v in edges])
    assert broken_properties(graph, decompose(graph, radius=5.0, r=4)) == []


def test_a_clique_is_named():
    pairs = [(u, v, 1.0) for v in range(6) for u in range(v)]
    found = partition(make_graph(6, pairs), eps=1.0, r=5)
    assert "contains K_6; use r 7" in found.note and len(found.cops.minor) == 6
    assert partition(make_graph(6, pairs), eps=1.0, r=7).cops.width == 6


@settings(max_examples=20, deadline=None)
@given(meshes(), st.randoms(use_true_random=False))
def test_other_numbers_keep_the_properties(graph, shuffler):
    order = list(range(graph.size))
    shuffler.shuffle(order)
    edges = [(order[u], order[v], w) for u, v, w in graph.edges()]
    found = partition(make_graph(graph.size, edges), eps=0.5, r=5)
    assert broken_properties(make_graph(graph.size, edges), found.cops) == []


def test_the_checks_find_what_is_broken():
    """Each property breaks where the decomposition is spoilt for it."""
    graph = box_graph((24, 24), (0, 0))
    cops = decompose(graph, radius=8.0, r=5)
    assert broken_properties(graph, cops) == []
    spoil = lambda **changes: broken_properties(
        graph, dataclasses.replace(cops, **changes)
    )
    assert "radius" in spoil(radius=0.1) and "bags" in spoil(r=3)
    assert "buffer" in spoil(r=1)
    owner = list(cops.owner)
    owner[0], owner[-1] = owner[-1], owner[0]
    assert "connected" in spoil(owner=tuple(owner))
    assert "edges" in spoil(parents=(-1,) * cops.count)
    bent = next(s for s in cops.skeletons if len(s) > 4)
    leaf = next(v for v, b in bent if b != v and v not in dict(bent).values())
    other = next(v for v, b in bent if v == b)
    moved = tuple((v, other if v == leaf else b) for v, b in bent)
    spoilt = tuple(moved if s is bent else s for s in cops.skeletons)
    assert "skeleton" in spoil(skeletons=spoilt)


@pytest.mark.parametrize(("side", "eps"), [(8, 0.5), (16, 0.5), (16, 1.0), (32, 0.5)])
def test_grids_take_few_hops(side, eps):
    graph = box_graph((side, side), (0, 0))
    found = partition(graph, eps=eps, r=5)
    assert broken_partition(graph, found) == [] if side < 32 else True
    assert strong_diameter(graph, found) <= eps * found.diameter if side < 32 else True
    hops = worst_hops(graph, found, list(range(0, graph.size, max(1, side * 2 - 3))))
    assert hops <= 20


def test_hops_stay_on_the_path():
    """Clusters in a ring: the way round the other side isn't taken."""
    ring = box_graph((6,), (6,))
    found = partition(ring, eps=0.1, r=4)
    assert found.size == 6
    beside = cluster_links(ring, found)
    path = [int(found.cluster[v]) for v in (0, 1, 2, 3, 4)]
    assert hops_along(beside, path) == 4


@settings(max_examples=15, deadline=None)
@given(graphs(most=16), st.sampled_from([0.0, 0.25, 1.0]))
def test_covers_span_and_keep_distances(graph, eps):
    found = cover(graph, eps=eps)
    table = np.minimum.reduce([tree_distances(graph, row) for row in found.parents])
    off = ~np.eye(graph.size, dtype=bool)
    assert (table[off] >= graph.distances[off] - 1e-9).all()
    assert (table[off] <= (1 + eps) * graph.distances[off] * (1 + 1e-9) + 1e-9).all()
    for row in found.parents:
        edges = [(v, p, 1.0) for v, p in enumerate(row.tolist()) if v != p]
        tree = make_graph(graph.size, edges)
        assert len(edges) == graph.size - 1 and len(tree.components()) == 1


def test_a_path_needs_one_tree():
    path = box_graph((9,), (0,))
    assert cover(path, eps=0.0).size == 1 and cover(path, eps=0.0).stretch == 1
    assert cover(box_graph((8, 8), (0, 0)), eps=1.0).size <= 8


@settings(max_examples=25, deadline=None)
@given(graphs(most=40), st.integers(0, 9))
def test_the_oracle_is_the_least_over_trees(graph, seed):
    rng = np.random.default_rng(seed)
    roots = rng.integers(0, graph.size, 3)
    rows = [path_tree(graph, int(root), max) for root in roots]
    oracle = make_oracle(graph, np.array(rows))
    u, v = (x.ravel() for x in np.meshgrid(range(graph.size), range(graph.size)))
    expected = np.minimum.reduce([tree_distances(graph, row) for row in rows])[u, v]
    np.testing.assert_allclose(oracle.distances(u, v), expected, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(graphs(most=40, connected=False), st.integers(0, 9))
def test_forests_never_shorten(graph, seed):
    rows = list(forests(graph, landmarks=2, copies=1, seed=seed))
    oracle = make_oracle(graph, np.array(rows))
    u, v = (x.ravel() for x in np.meshgrid(range(graph.size), range(graph.size)))
    found, exact = oracle.distances(u, v), graph.distances[u, v]
    assert (found >= exact - 1e-4).all() and (found[u == v] == 0).all()
    for row in rows:
        assert len(from_the_root(row)) == graph.size


@settings(max_examples=25, deadline=None)
@given(graphs(), st.data())
def test_terminals_keep_their_distances(graph, data):
    terminals = data.draw(
        st.lists(st.integers(0, graph.size - 1), min_size=1, unique=True)
    )
    small, region = steiner(graph, terminals)
    assert small.size == len(terminals) and len(small.components()) == 1
    for place, terminal in enumerate(terminals):
        assert region[terminal] == place
        part = [v for v in range(graph.size) if region[v] == place]
        assert len(split_components(graph, part)) == 1
    exact = graph.distances[np.ix_(terminals, terminals)]
    for u, v, weight in small.edges():
        np.testing.assert_allclose(weight, exact[u, v], atol=1e-9)
    assert (small.distances >= exact - 1e-9).all()


def test_no_vertices_and_one():
    none, one = Graph((), ()), make_graph(1, [])
    assert (
        partition(none, eps=0.5).size == 0
        and decompose(none, radius=1.0, r=3).count == 0
    )
    assert partition(one, eps=0.5).cluster.tolist() == [0]
    assert shortest_paths(one, [0])[0] == {0: 0.0}


BAD = {
    "eps": (lambda g: partition(g, eps=0.0), "positive"),
    "nan": (lambda g: partition(g, eps=float("nan")), "positive"),
    "r": (lambda g: decompose(g, radius=1.0, r=2), "r is 2"),
    "radius": (lambda g: decompose(g, radius=-1.0, r=5), "must be positive"),
    "cover": (lambda g: cover(g, eps=-1.0), "0 or more"),
    "parts": (lambda g: cover(make_graph(2, []), eps=1.0), "2 parts"),
    "large": (lambda g: cover(box_graph((40, 40), (0, 0)), eps=1.0), "at most"),
    "terminal": (lambda g: steiner(g, [9]), "isn't there"),
    "again": (lambda g: steiner(g, [1, 1]), "each once"),
    "circle": (lambda g: make_oracle(g, np.array([1, 0, 2, 2])), "circle"),
    "stranger": (lambda g: make_oracle(g, np.array([0, 0, 0, 0])), "neighbour"),
    "marks": (lambda g: list(forests(g, landmarks=0)), "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line(case):
    make, said = BAD[case]
    with pytest.raises(ConfigError, match=said) as caught:
        make(box_graph((2, 2), (0, 0)))
    assert "\n" not in str(caught.value)
