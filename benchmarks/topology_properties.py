"""The paper's properties on real and random graphs, the oracle on a large one.

    python benchmarks/topology_properties.py --out benchmarks/results/topology.json
    python benchmarks/topology_properties.py --oracle 100000 --out ...
    python benchmarks/topology_properties.py --peer 100000 --out ...

Needs topohub 1.5.1, networkx, rustworkx, routingkit-cch and scipy beside numpy, no jax.
Buffered cop decompositions and shortcut partitions of Chang et al. 2024 (arXiv
2308.00555) of every graph of topohub up to 150 vertices and of random planar graphs,
2-trees, trees, grids with dead chips, tori: all properties of the definition, hops and
bags.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np

from uoe_jax.files import format_json
from uoe_jax.topology import make_graph, make_oracle, partition
from uoe_jax.topology.cops import decompose
from uoe_jax.topology.oracle import forests
from uoe_jax.topology.shortcut import measure_diameter, worst_hops
from uoe_jax.topology.verify import broken_partition, broken_properties, radius_share

EPS = (0.9, 0.3)
MOST = 150  # vertices of a real graph
QUERIES = 20_000


def as_ours(graph):
    """A networkx graph with numbers for names; lengths that aren't above 0 are 1."""
    number = {node: place for place, node in enumerate(graph.nodes)}
    edges = []
    for u, v, about in graph.edges(data=True):
        length = float(about.get("dist", about.get("weight", 1.0)) or 1.0)
        edges.append((number[u], number[v], length if length > 0 else 1.0))
    return make_graph(len(number), edges)


def real_graphs():
    """Every graph of topohub that isn't too large: its name and itself."""
    import topohub

    root = Path(topohub.__file__).parent / "data"
    for path in sorted(root.rglob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not 2 <= len(content.get("nodes", ())) <= (
            MOST
        ):
            continue
        graph = nx.Graph()
        graph.add_nodes_from(node["id"] for node in content["nodes"])
        for edge in content.get("edges", content.get("links", ())):
            graph.add_edge(edge["source"], edge["target"], dist=edge.get("dist", 1.0))
        yield f"topohub/{path.relative_to(root).with_suffix('')}", graph


def random_graphs(count, seed=0):
    """Random graphs of known r: (name, graph, r)."""
    rng = random.Random(seed)
    from scipy.spatial import Delaunay

    for number in range(count):
        kind = ("tree", "2-tree", "planar", "grid", "torus")[number % 5]
        size = rng.randrange(10, 120)
        weight = lambda: 10 ** rng.uniform(-1, 1)
        if kind == "tree":
            graph, r = nx.random_labeled_tree(size, seed=rng.randrange(2**31)), 3
        elif kind == "2-tree":
            graph, r = nx.path_graph(2), 4
            for v in range(2, size):
                u, w = rng.choice(list(graph.edges))
                graph.add_edges_from([(u, v), (w, v)])
        elif kind == "planar":
            points = np.random.default_rng(number).random((size, 2))
            graph, r = nx.Graph(), 5
            for a, b, c in Delaunay(points).simplices:
                graph.add_edges_from([(a, b), (b, c), (c, a)])
        else:
            side = rng.randrange(4, 14)
            torus = kind == "torus"
            graph, r = nx.grid_2d_graph(side, side, periodic=torus), 8 if torus else 5
            dead = rng.sample(sorted(graph.nodes), int(side * side * rng.random() / 7))
            graph.remove_nodes_from(dead)
        if rng.random() < 0.7:
            for u, v in graph.edges:
                graph[u][v]["weight"] = weight()
        yield f"random {kind}", graph, r


def check(name, graph, r, eps, source):
    """Every property of one graph at one eps, as a row."""
    diameter = measure_diameter(graph)
    found = partition(graph, eps=eps, r=r, diameter=diameter)
    cops = found.cops
    step = max(1, graph.size // 12)
    return {
        "graph": name,
        "kind": source,
        "vertices": graph.size,
        "r": r,
        "eps": eps,
        "broken": broken_properties(graph, cops) + broken_partition(graph, found),
        "bag": cops.width,
        "radius": radius_share(graph, cops) if graph.size else 0.0,
        "supernodes": cops.count,
        "clusters": found.size,
        "eps_h": worst_hops(graph, found, list(range(0, graph.size, step))),
    }


def all_rows(count, until):
    """Rows of all graphs, until the time is over."""
    rows = []

    def add(name, graph, r, kind):
        ours = as_ours(graph)
        for eps in EPS:
            rows.append(check(name, ours, r, eps, kind))

    for name, graph in real_graphs():
        planar, _ = nx.check_planarity(graph)
        add(name, graph, 5 if planar else 16, "real planar" if planar else "real other")
        if time.monotonic() > until:
            return rows
    for name, graph, r in random_graphs(count):
        add(name, graph, r, name)
        if time.monotonic() > until:
            return rows
    return rows


def without_growth(limit):
    """How many real planar graphs lose their buffer where no supernode grows."""
    import uoe_jax.topology.cops as module

    lost = tried = 0
    grow = module._Build._grow
    module._Build._grow = lambda self, part, cut: [part]
    try:
        for _, graph in real_graphs():
            if not nx.check_planarity(graph)[0]:
                continue
            ours = as_ours(graph)
            radius = 0.9 * measure_diameter(ours) / 4
            cops = decompose(ours, radius=radius or 1.0, r=5)
            tried += 1
            lost += "buffer" in broken_properties(ours, cops)
            if tried >= limit:
                break
    finally:
        module._Build._grow = grow
    return {"graphs": tried, "buffer_lost": lost}


def summary(rows):
    """Counts and extremes by kind of graph."""
    found = {}
    for kind in sorted({row["kind"] for row in rows}):
        own = [row for row in rows if row["kind"] == kind]
        found[kind] = {
            "graphs": len({(r["graph"], r["vertices"]) for r in own}),
            "cases": len(own),
            "all_hold": sum(not row["broken"] for row in own),
            "broken": dict(Counter(b for row in own for b in row["broken"])),
            "largest_bag": max(row["bag"] for row in own),
            "r": sorted({row["r"] for row in own}),
            "largest_radius": max(row["radius"] for row in own),
            "largest_eps_h": max(row["eps_h"] for row in own),
        }
    return found


def road_like(size):
    """A planar graph: its points, its edges with lengths, and what drew them."""
    from scipy.spatial import Delaunay

    rng = np.random.default_rng(0)
    points = rng.random((size, 2))
    pairs = {
        (min(a, b), max(a, b))
        for s in Delaunay(points).simplices.tolist()
        for a, b in ((s[0], s[1]), (s[1], s[2]), (s[2], s[0]))
    }
    length = lambda u, v: float(np.linalg.norm(points[u] - points[v])) * size**0.5
    return points, [(u, v, length(u, v)) for u, v in sorted(pairs)], rng


def measure_peer(size):
    """Exact distances by a customizable contraction hierarchy (routingkit-cch).

    Dibbelt, Strasser and Wagner 2016. Hub labels have no package on the index.
    """
    import routingkit_cch as rk

    points, edges, rng = road_like(size)
    start = time.perf_counter()
    tail = [u for u, v, _ in edges] + [v for u, v, _ in edges]
    head = [v for u, v, _ in edges] + [u for u, v, _ in edges]
    lengths = [round(length * 1e6) for _, _, length in edges] * 2
    order = rk.compute_order_inertial(
        size, tail, head, points[:, 0].tolist(), points[:, 1].tolist()
    )
    metric = rk.CCHMetric(rk.CCH(order, tail, head, False), lengths)
    built = time.perf_counter() - start
    query = rk.CCHQuery(metric)
    ends = rng.integers(0, size, (QUERIES // 10, 2)).tolist()
    start = time.perf_counter()
    for u, v in ends:
        query.run(u, v)
    asked = (time.perf_counter() - start) / len(ends)
    return {
        "package": "routingkit-cch 0.1.4",
        "build_seconds": built,
        "microseconds_per_query": asked * 1e6,
    }


def measure_oracle(size, landmarks, copies):
    """The oracle of a road-like graph beside exact distances by rustworkx."""
    import rustworkx as rx

    _, edges, rng = road_like(size)
    graph = make_graph(size, edges)
    start = time.perf_counter()
    rows = np.array(list(forests(graph, landmarks=landmarks, copies=copies)))
    oracle = make_oracle(graph, rows)
    built = time.perf_counter() - start
    exact = rx.PyGraph()
    exact.add_nodes_from(range(size))
    exact.add_edges_from(edges)
    sources = rng.choice(size, 100, replace=False)
    u = np.repeat(sources, QUERIES // 100)
    v = rng.integers(0, size, len(u))
    start = time.perf_counter()
    found = oracle.distances(u, v)
    asked = (time.perf_counter() - start) / len(u)
    lengths, start = [], time.perf_counter()
    for source in sources.tolist():
        found_from = rx.dijkstra_shortest_path_lengths(exact, source, float)
        lengths.append(dict(found_from.items()) | {source: 0.0})
    searched = (time.perf_counter() - start) / len(sources)
    true = np.array([lengths[i // (QUERIES // 100)].get(int(t), 0.0)
                     for i, t in enumerate(v)])  # fmt: skip
    far = true > 0
    stretch = found[far] / true[far]
    # One source's near vertices too: random pairs are almost all far apart.
    near_stretch = []
    for source, row in zip(sources.tolist(), lengths, strict=True):
        ends = sorted(row, key=row.__getitem__)[1:201]
        got = oracle.distances(np.full(len(ends), source), np.array(ends))
        near_stretch.extend(got / np.array([row[e] for e in ends]))
    return {
        "vertices": size,
        "edges": len(edges),
        "forests": len(rows),
        "bytes_per_vertex": oracle.num_bytes / size,
        "build_seconds": built,
        "microseconds_per_query": asked * 1e6,
        "dijkstra_milliseconds_per_source": searched * 1e3,
        "stretch": _spread(stretch),
        "stretch_of_200_nearest": _spread(np.array(near_stretch)),
    }


def _spread(stretch):
    return {
        "median": float(np.median(stretch)),
        "percentile_99": float(np.percentile(stretch, 99)),
        "worst": float(stretch.max()),
        "least": float(stretch.min()),
    }


def draw(rows, path):
    """Hops and bags of all cases as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in sorted({row["kind"] for row in rows}):
        own = [row for row in rows if row["kind"] == kind]
        sizes = [row["vertices"] for row in own]
        left.scatter(sizes, [r["eps_h"] for r in own], s=7, alpha=0.6, label=kind)
        right.scatter(sizes, [r["bag"] for r in own], s=7, alpha=0.6)
    left.set(xlabel="vertices", ylabel="hops over ceil(d / (eps D))")
    left.legend(fontsize=7)
    right.set(xlabel="vertices", ylabel="largest bag")
    figure.savefig(path, dpi=130)


def main():
    """Write what was found, part by part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("topology_properties.json"))
    parser.add_argument("--random", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--oracle", type=int, default=0, help="vertices; 0: properties")
    parser.add_argument("--peer", type=int, default=0, help="vertices, of the peer")
    parser.add_argument("--landmarks", type=int, default=12)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.peer:
        record["oracle_peer"] = measure_peer(options.peer)
        print(format_json(record["oracle_peer"], indent=1))
    elif options.oracle:
        record["oracle"] = measure_oracle(
            options.oracle, options.landmarks, options.copies
        )
        print(format_json(record["oracle"], indent=1))
    else:
        rows = all_rows(options.random, time.monotonic() + options.seconds)
        record["graphs"] = len(rows) // len(EPS)
        record["summary"] = summary(rows)
        record["failures"] = [row for row in rows if row["broken"]]
        record["without_growth"] = without_growth(457)
        shown = {name: record[name] for name in ("graphs", "summary", "without_growth")}
        print(format_json(shown, indent=1))
        if options.plot:
            draw(rows, options.plot)
    options.out.write_text(format_json(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
