"""Ring orders: permutations, never worse than where they began, single hops."""

import itertools
import math
from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.topology.weighted import graphs
from uoe_jax.errors import ConfigError, all_divisors
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.partition.stand_in import jax_order
from uoe_jax.topology import box_graph, from_topology, make_graph, order_mesh
from uoe_jax.topology.rings import _checked, describe_order
from uoe_jax.topology.search import improve_ring, swap_search
from uoe_jax.topology.walks import fold


def cost(graph, order, traffic):
    """Weighted mean hops, pair by pair."""
    total = 0.0
    for axis, size in enumerate(order.shape):
        if size == 1:
            continue
        rows = np.moveaxis(order, axis, 0).reshape(size, -1)
        pairs = [
            graph.distances[rows[i, j], rows[(i + 1) % size, j]]
            for i in range(size)
            for j in range(rows.shape[1])
        ]
        total += traffic[axis] * sum(pairs) / len(pairs)
    return total / graph.least


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_an_order_is_never_worse_than_its_start(data):
    graph = data.draw(graphs(most=16))
    shape, left = [], graph.size
    while left > 1 and len(shape) < 2:
        shape.append(data.draw(st.sampled_from(all_divisors(left))))
        left //= shape[-1]
    shape.append(left)
    traffic = [float(data.draw(st.integers(0, 9))) for _ in shape]
    start = np.array(data.draw(st.permutations(range(graph.size)))).reshape(shape)
    found = order_mesh(graph, shape, traffic, start=start, moves=40)
    assert sorted(found.vertices.ravel().tolist()) == list(range(graph.size))
    assert found.vertices.shape == tuple(shape)
    ours = cost(graph, found.vertices, traffic)
    assert ours <= cost(graph, start, traffic) + 1e-9
    total = sum(w * h for w, h in zip(traffic, found.hops, strict=True))
    np.testing.assert_allclose(ours, total, atol=1e-9)
    again = order_mesh(graph, shape, traffic, start=start, moves=40)
    assert np.array_equal(again.vertices, found.vertices)


@pytest.mark.parametrize("columns", range(2, 12))
def test_two_rows_have_a_cycle(columns):
    grid = box_graph((2, columns), (0, 0))
    plain = make_graph(grid.size, grid.edges())
    for graph in (grid, plain):
        found = order_mesh(graph, (grid.size,))
        assert found.hops == (1.0,) and found.loads == (1,)


@pytest.mark.parametrize(
    ("name", "shape", "traffic", "most"),
    [
        ("v4-8", (4,), [1], 1),
        ("v5e:2x4", (2, 4), [1, 8], 10 / 9),
        ("v5e:4x4", (2, 8), [1, 8], 10 / 9),
        ("v5e:4x4", (4, 4), [1, 8], 10 / 9),
        ("v6e:8x8", (64,), [1], 1),
        ("v6e:8x8", (4, 16), [1, 8], 11 / 9),
        ("v5p:4x4x4", (64,), [1], 1),
        ("v5p:4x4x4", (2, 32), [1, 8], 1),
        ("v5p:4x4x4", (8, 8), [1, 8], 1),
        ("v5e:16x16", (16, 16), [1, 8], 1),
    ],
)
def test_slices_have_short_rings(name, shape, traffic, most):
    topology = parse_topology(name)
    graph, traffic = from_topology(topology), [float(w) for w in traffic]
    start = jax_order(topology, shape)
    found = order_mesh(graph, shape, traffic, start=start)
    assert found.cost(traffic) <= most + 1e-9
    assert found.cost(traffic) <= describe_order(graph, start).cost(traffic) + 1e-9


@pytest.mark.parametrize("dead", [[0], [5], [0, 3], [0, 1], [3, 5]])
def test_dead_chips_leave_the_best_ring_there_is(dead):
    """A ring of single hops needs as many chips of either colour of the chequers."""
    graph, kept = box_graph((4, 4), (0, 0)).without(dead)
    colours = sum(1 if (v // 4 + v % 4) % 2 else -1 for v in kept.tolist())
    found = order_mesh(graph, (graph.size,))
    assert found.hops[0] <= 1 + abs(colours) / graph.size + 1e-9
    assert found.loads[0] >= 1 and found.worst[0] >= found.hops[0]


def test_a_switch_and_few_devices_keep_their_order():
    start = np.random.default_rng(0).permutation(8).reshape(2, 4)
    switch = from_topology(parse_topology("h100:8"))
    assert order_mesh(switch, (2, 4), start=start).vertices.tolist() == start.tolist()
    one = order_mesh(make_graph(1, []), (1, 1))
    assert one.hops == (0.0, 0.0) and one.loads == (0, 0)
    two = order_mesh(make_graph(2, [(0, 1, 3.0)]), (2,))
    assert two.hops == (1.0,) and two.loads == (1,)


def test_slices_that_a_network_joins_stay_together():
    """Two 2 x 2 slices, 20 times as far apart: each axis of 4 stays in one."""
    square = [(0, 1), (1, 3), (3, 2), (2, 0)]
    edges = [(a + s, b + s, 1.0) for s in (0, 4) for a, b in square]
    edges += [(a, b, 20.0) for a in range(4) for b in range(4, 8)]
    graph = make_graph(8, edges)
    start = np.array([[0, 4, 1, 5], [2, 6, 3, 7]])
    found = order_mesh(graph, (2, 4), [1.0, 8.0], start=start)
    assert found.hops == (20.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(graphs(most=14), st.integers(0, 99))
def test_ring_search_keeps_the_vertices(graph, seed):
    table = graph.distances
    ring = np.random.default_rng(seed).permutation(graph.size)
    found = improve_ring(table, ring, kicks=5)
    assert sorted(found.tolist()) == sorted(ring.tolist())
    assert found[0] == ring[0]
    length = lambda walk: table[walk, np.roll(walk, -1)].sum()
    assert length(found) <= length(ring) + 1e-9


def test_ring_search_finds_the_shortest_of_all():
    rng = np.random.default_rng(3)
    for _ in range(5):
        points = rng.random((8, 2))
        table = np.linalg.norm(points[:, None] - points[None], axis=-1)
        length = lambda walk, table=table: table[walk, np.roll(walk, -1)].sum()
        found = improve_ring(table, np.arange(8))
        every = ([0, *rest] for rest in itertools.permutations(range(1, 8)))
        best = min(length(np.array(walk)) for walk in every)
        np.testing.assert_allclose(length(found), best, atol=1e-9)


def test_swaps_find_the_cheapest_of_all():
    """Dense and sparse flow, with and without a cost of each vertex alone."""
    rng = np.random.default_rng(7)
    for case in range(6):
        table, flow = (m + m.T for m in rng.random((2, 6, 6)))
        np.fill_diagonal(table, 0)
        np.fill_diagonal(flow, 0)
        alone = rng.random((6, 6)) if case % 2 else None

        def value(order, flow=flow, table=table, alone=alone):
            total = 0.5 * (flow * table[np.ix_(order, order)]).sum()
            return total + (0 if alone is None else alone[range(6), order].sum())

        found = swap_search(table, flow, np.arange(6), moves=300, alone=alone)
        every = map(np.array, itertools.permutations(range(6)))
        best = min(value(order) for order in every)
        np.testing.assert_allclose(value(found), best, atol=1e-9)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2), (4, 1, 3)])
def test_a_folded_walk_steps_along_axes(shape):
    order = fold(np.arange(math.prod(shape)), shape)
    places = {int(v): index for index, v in np.ndenumerate(order)}
    for v in range(order.size - 1):
        apart = np.abs(np.subtract(places[v], places[v + 1]))
        assert apart.sum() == 1


BAD = {
    "shape": (lambda g: order_mesh(g, (3, 4)), "product is 16"),
    "zero": (lambda g: order_mesh(g, (0, 16)), "product is 16"),
    "traffic": (lambda g: order_mesh(g, (4, 4), [1.0]), "one number for each axis"),
    "nan": (lambda g: order_mesh(g, (4, 4), [1.0, math.nan]), "finite number"),
    "minus": (lambda g: order_mesh(g, (4, 4), [1.0, -1.0]), "finite number"),
    "start": (
        lambda g: order_mesh(g, (4, 4), start=np.zeros((4, 4), int)),
        "each one once",
    ),
    "word": (lambda g: unwrap(_checked)(g, (4, 4), ["x", 1.0]), "finite number"),
    "half": (lambda g: unwrap(_checked)(g, (4.5, 4), None), "whole number"),
    "seed": (lambda g: order_mesh(g, (4, 4), seed=-1), "not be negative"),
    "parts": (lambda g: order_mesh(make_graph(2, []), (2,)), "2 parts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line(case):
    make, said = BAD[case]
    with pytest.raises(ConfigError, match=said) as caught:
        make(box_graph((4, 4), (0, 0)))
    assert "\n" not in str(caught.value)
