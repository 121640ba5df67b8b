"""Graphs of devices: coordinates, nvidia-smi's table, JSON; errors in one line."""

import json
from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings

from tests.topology.weighted import graphs
from uoe_jax.errors import UoeError
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.topology import (
    box_graph,
    from_coordinates,
    from_nvidia_smi,
    from_topology,
    make_graph,
    read_graph,
)
from uoe_jax.topology.graph import Graph, check_connected, shortest_paths
from uoe_jax.topology.sources import from_json

DGX1 = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tmlx5_0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV1\tNV2\tSYS\tPIX\t0-19,40-59\t0
GPU1\tNV1\t X \tNV1\tNV2\tPIX\t0-19,40-59\t0
GPU2\tNV2\tNV1\t X \tPHB\tPHB\t0-19,40-59\t0
GPU3\tSYS\tNV2\tPHB\t X \tPHB\t0-19,40-59\t0
mlx5_0\tPIX\tPIX\tPHB\tPHB\t X

Legend:

  X    = Self
"""


def oracle(graph):
    """Distances by Bellman and Ford's recursion."""
    found = np.full((graph.size, graph.size), np.inf)
    np.fill_diagonal(found, 0)
    for _ in range(graph.size):
        for u, v, w in graph.edges():
            found[:, v] = np.minimum(found[:, v], found[:, u] + w)
            found[:, u] = np.minimum(found[:, u], found[:, v] + w)
    return found


@settings(max_examples=60, deadline=None)
@given(graphs(connected=False))
def test_distances(graph):
    expected = oracle(graph)
    np.testing.assert_allclose(graph.distances, expected, atol=1e-9)
    lengths, before = shortest_paths(graph, [0])
    for vertex, length in lengths.items():
        np.testing.assert_allclose(length, expected[0, vertex], atol=1e-9)
        if vertex:
            weight = dict(graph.links[vertex])[before[vertex]]
            np.testing.assert_allclose(
                lengths[before[vertex]] + weight, length, atol=1e-9
            )
    assert len(lengths) == np.isfinite(expected[0]).sum()


@pytest.mark.parametrize(
    "name", ["v5p:4x4x4", "v5p:2x2x4", "v5e:4x8", "v5e:16x16", "tpu7x:2x2x1"]
)
def test_a_box_has_the_distances_of_its_links(name):
    graph = from_topology(parse_topology(name))
    plain = make_graph(graph.size, graph.edges())
    np.testing.assert_allclose(graph.distances, plain.distances, atol=1e-9)
    assert graph.size == parse_topology(name).num_devices


def test_distances_of_many_vertices():
    """A ring of 1,100 and a vertex without a link, beside Dijkstra from a few."""
    rng = np.random.default_rng(5)
    edges = [(i, (i + 1) % 1100, float(rng.uniform(0.5, 2))) for i in range(1100)]
    graph = make_graph(1101, edges)
    for source in (0, 7, 1023, 1024, 1099):
        lengths = shortest_paths(graph, [source])[0]
        want = [lengths.get(vertex, np.inf) for vertex in range(graph.size)]
        np.testing.assert_allclose(graph.distances[source], want, atol=1e-3)
    assert np.isinf(graph.distances[1100, :1100]).all()


def test_edges_that_repeat_and_loops():
    graph = make_graph(3, [(0, 1, 2.0), (1, 0, 0.5), (2, 2, 1.0), (1, 2, 1.0)])
    assert graph.edges() == [(0, 1, 0.5), (1, 2, 1.0)]
    assert not graph.switched and box_graph((2,), (0,)).switched


def test_chips_at_coordinates():
    graph = from_coordinates([(0, 0), (1, 0), (0, 1), (3, 0)], sides=(4, 0))
    assert graph.edges() == [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0)]


def test_a_link_may_have_keys_of_other_programs():
    link = {"source": 0, "target": 1, "weight": 2, "key": 0, "label": "x", "port": 1}
    assert from_json({"links": [link]}).edges() == [(0, 1, 2.0)]


def test_what_nvidia_smi_prints():
    graph = from_nvidia_smi(DGX1)
    assert graph.names == ("GPU0", "GPU1", "GPU2", "GPU3")
    weights = {(u, v): w for u, v, w in graph.edges()}
    assert weights[0, 2] == 1 and weights[0, 1] == 2
    assert weights[0, 3] > weights[2, 3] > weights[0, 1]
    assert from_nvidia_smi("\tGPU0\tCPU Affinity\nGPU0\t X \t0-3\n").size == 1


def test_json_forms(tmp_path):
    node_link = {
        "nodes": [{"id": "a"}, {"id": "b"}, {"id": "c"}],
        "links": [
            {"source": "a", "target": "b", "dist": 2.5},
            {"source": "b", "target": "c", "bandwidth": 4},
        ],
    }
    graph = from_json(node_link)
    assert graph.names == ("a", "b", "c")
    assert graph.edges() == [(0, 1, 2.5), (1, 2, 0.25)]
    plain = from_json({"edges": [[2, 0], [0, 10, 3]]})
    assert plain.names == ("0", "2", "10")
    assert plain.edges() == [(0, 1, 1.0), (0, 2, 3.0)]
    (tmp_path / "topo.txt").write_text(DGX1)
    assert read_graph(tmp_path / "topo.txt").size == 4


BAD = {
    "nan": (lambda: make_graph(2, [(0, 1, float("nan"))]), "positive, finite"),
    "zero": (lambda: make_graph(2, [(0, 1, 0.0)]), "positive, finite"),
    "negative": (lambda: from_json({"links": [[0, 1, -2]]}), "positive, finite"),
    "huge": (lambda: from_json({"links": [[0, 1, 10**400]]}), "positive, finite"),
    "end": (lambda: make_graph(2, [(0, 2, 1.0)]), "isn't there"),
    "node": (lambda: from_json({"nodes": [1], "links": [[1, 2]]}), "nodes; add it"),
    "twice": (lambda: from_json({"nodes": [1, 1], "links": []}), "unique"),
    "word": (lambda: from_json({"links": [[0, 1, "far"]]}), "must be a number"),
    "truth": (lambda: from_json({"links": [[0, 1, True]]}), "must be a number"),
    "list": (lambda: from_json([1]), "expected an object"),
    "empty": (lambda: from_json({}), "no list of links"),
    "no end": (lambda: from_json({"links": [{"source": 1}]}), "source and a target"),
    "rate": (
        lambda: from_json({"links": [{"source": 0, "target": 1, "bandwidth": 0}]}),
        "bandwidth 0",
    ),
    "place": (lambda: from_coordinates([(0, 0), (0, 0)]), "both at"),
    "ragged": (lambda: from_coordinates([(0, 0), (1,)]), "same number"),
    "smi": (lambda: from_nvidia_smi("no table"), "GPU0"),
    "link": (lambda: from_nvidia_smi(DGX1.replace("NV2", "NVX")), "'NVX'"),
    "row": (lambda: from_nvidia_smi(DGX1[: DGX1.index("GPU2\tNV2")]), "no link from"),
    "dead": (lambda: box_graph((2, 2), (0, 0)).without([4]), "device 4 isn't"),
    "all": (lambda: box_graph((2,), (0,)).without([0, 1]), "all 2 devices are dead"),
    "parts": (lambda: check_connected(make_graph(2, [])), "2 parts"),
    "none": (lambda: check_connected(make_graph(0, [])), "no vertices"),
    "misspelt": (
        lambda: from_json({"links": [{"source": 0, "target": 1, "bandwith": 50}]}),
        "did you mean bandwidth",
    ),
    "null": (
        lambda: from_json({"links": [{"source": 0, "target": 1, "weight": None}]}),
        "weight None; it must be a number",
    ),
    "text": (lambda: unwrap(make_graph)(2, [(0, 1, "a")]), "positive, finite"),
    "half": (lambda: unwrap(make_graph)(2, [(0, 0.5, 1.0)]), "whole number"),
    "half dead": (
        lambda: unwrap(Graph.without)(box_graph((2,), (0,)), [1.5]),
        "whole number",
    ),
    "outside": (lambda: from_coordinates([(0,), (3,)], sides=(2,)), "outside"),
    "half place": (lambda: unwrap(from_coordinates)([(0.5,)]), "whole number"),
    "no dead": (
        lambda: check_connected(from_json({"links": []}).without([])[0]),
        "no vertices",
    ),
    "switches": (lambda: from_topology(parse_topology("h100:16")), "several switches"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_graphs_are_one_line(case):
    make, said = BAD[case]
    with pytest.raises(UoeError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[1]", b'{"links": [[1]]}'])
def test_bad_files_name_the_file(tmp_path, content):
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    with pytest.raises(UoeError, match="graph.json") as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UoeError, match="can't be read"):
        read_graph(tmp_path / "absent.json")


def test_json_of_numbers_and_names():
    graph = from_json({"links": [["x", 1], [1, 2]]})
    assert graph.names == ("1", "2", "x")
    assert json.dumps(graph.edges()) == "[[0, 1, 1.0], [0, 2, 1.0]]"
