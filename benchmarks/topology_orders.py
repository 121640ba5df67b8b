"""Orders of devices: jax's beside ours and those of general solvers, in equal seconds.

    python benchmarks/topology_orders.py --out benchmarks/results/topology_orders.json \
        --plot docs/images/topology_orders.png

Mean links between the neighbours on each axis' rings, on slices that exist, slices with
dead chips and two slices that a network joins. jax's order is that of its `mesh_utils`
on stand-in devices. Peers: `scipy.optimize.quadratic_assignment` (faq and 2opt), and
for one ring networkx' `traveling_salesman_problem` (Christofides; then its threshold
accepting), each restarted until the time is over, the best kept. Without networkx that
column stays empty. Peers of rows that FILE has already aren't run again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy.optimize import quadratic_assignment

from uoe_jax.files import format_json
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.partition.stand_in import jax_order
from uoe_jax.topology import from_topology, make_graph, order_mesh
from uoe_jax.topology.rings import describe_order
from uoe_jax.topology.search import _flow

REGULAR = (
    ("v4-8", (4,), (1,)),
    ("v5e:2x4", (8,), (1,)),
    ("v5e:2x4", (2, 4), (1, 8)),
    ("v5e:4x4", (2, 8), (1, 8)),
    ("v5e:4x4", (4, 4), (1, 8)),
    ("v6e:8x8", (64,), (1,)),
    ("v6e:8x8", (4, 16), (1, 8)),
    ("v5p:4x4x4", (64,), (1,)),
    ("v5p:4x4x4", (2, 32), (1, 8)),
    ("v5p:4x4x4", (8, 8), (1, 8)),
    ("v5e:16x16", (16, 16), (1, 8)),
)
_MOST = 128  # devices that peers are tried on; one try of more takes minutes
DEAD = (
    ("v5e:4x4", (3, 5), (14,), (1,)),
    ("v6e:8x8", (9, 18), (62,), (1,)),
    ("v6e:8x8", (9, 11, 20, 33), (4, 15), (1, 8)),
    ("v5p:4x4x4", (0, 21, 42, 63), (4, 15), (1, 8)),
)


def two_slices(name, far=20.0):
    """Two slices of a name, each chip joined to its like by a link 20 times as long."""
    one = from_topology(parse_topology(name))
    edges = [(u + s, v + s, w) for s in (0, one.size) for u, v, w in one.edges()]
    edges += [(v, v + one.size, far) for v in range(one.size)]
    return make_graph(2 * one.size, edges)


def cases():
    """(title, graph, shape, traffic, start) of every row."""
    for name, shape, traffic in REGULAR:
        topology = parse_topology(name)
        graph = from_topology(topology)
        yield name, graph, shape, traffic, jax_order(topology, shape)
    for name, dead, shape, traffic in DEAD:
        graph, _ = from_topology(parse_topology(name)).without(dead)
        title = f"{name} without {', '.join(map(str, dead))}"
        yield title, graph, shape, traffic, np.arange(graph.size).reshape(shape)
    for name, shape in (("v5e:2x4", (4, 4)), ("v5e:4x4", (4, 8))):
        graph = two_slices(name)
        title = f"2 x {name} by a network"
        yield title, graph, shape, (1, 8), np.arange(graph.size).reshape(shape)


def until(seconds, make, cost):
    """The cheapest of the orders that `make(seed)` gives before the time is over."""
    start, best, tries = time.perf_counter(), None, 0
    while tries == 0 or time.perf_counter() - start < seconds:
        order = make(tries)
        if best is None or cost(order) < best:
            best = cost(order)
        tries += 1
    return {"cost": best, "tries": tries,
            "seconds": time.perf_counter() - start}  # fmt: skip


def peers(graph, shape, traffic, seconds):
    """What general solvers find in the seconds that ours took, at least."""
    table = graph.distances / graph.least
    flow = _flow(shape, traffic)
    cost = lambda order: describe_order(graph, order).cost(traffic)
    found = {}
    for method in ("faq", "2opt"):

        def assign(seed, method=method):
            options = {"rng": np.random.default_rng(seed)}
            if method == "faq" and seed:
                options["P0"] = "randomized"
            got = quadratic_assignment(flow, table, method=method, options=options)
            return got.col_ind.reshape(shape)

        found[f"qap_{method}"] = until(seconds, assign, cost)
    if len(shape) == 1:
        try:
            found["tsp"] = until(seconds, _salesman(table), cost)
        except ImportError as error:
            print(f"no TSP column: {error}", file=sys.stderr)
    return found


def _salesman(table):
    import networkx as nx

    full = nx.from_numpy_array(table)

    def walk(seed):
        method = nx.approximation.christofides
        if seed:
            method = lambda g, weight: nx.approximation.threshold_accepting_tsp(
                g, "greedy", weight=weight, seed=seed
            )
        found = nx.approximation.traveling_salesman_problem(
            full, nodes=list(full), cycle=True, method=method
        )
        return np.array(found[:-1])

    return walk


def main():
    """Print the table row by row and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("topology_orders.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of peers, at least")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    rows, drawn = [], []
    known = {}
    if options.out.exists():
        for row in json.loads(options.out.read_text())["rows"]:
            known[row["devices"], tuple(row["mesh"])] = row
    for title, graph, shape, traffic, start in cases():
        traffic = [float(w) for w in traffic]
        before, clock = describe_order(graph, start), time.perf_counter()
        ours = order_mesh(graph, shape, traffic, start=start)
        seconds = time.perf_counter() - clock
        row = {
            "devices": title,
            "mesh": shape,
            "traffic": traffic,
            "before": {"hops": before.hops, "worst": before.worst,
                       "loads": before.loads, "cost": before.cost(traffic)},
            "ours": {"hops": ours.hops, "worst": ours.worst, "loads": ours.loads,
                     "cost": ours.cost(traffic), "seconds": seconds},
        }  # fmt: skip
        kept = known.get((title, tuple(shape)), {})
        if "peers" in kept:
            row = kept
        elif not options.no_peers and graph.size <= _MOST:
            limit = max(options.seconds, seconds)
            row["peers"] = peers(graph, shape, traffic, limit)
        rows.append(row)
        drawn.append((title, graph, before, ours))
        others = {k: round(v["cost"], 3) for k, v in row.get("peers", {}).items()}
        print(title, shape, f"{before.cost(traffic):.3f} -> {ours.cost(traffic):.3f}",
              f"{seconds:.2f} s", others, flush=True)  # fmt: skip
        record = {
            "command": "python benchmarks/topology_orders.py",
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "scipy")},
            "rows": rows,
        }
        options.out.write_text(format_json(record, indent=1) + "\n")
    if options.plot:
        draw(drawn, options.plot)


def draw(drawn, path):
    """A pinned picture: rings of some meshes before and after."""
    from uoe_jax.report.topology import draw_orders

    panels = []
    for number in (3, 6, 12):
        title, graph, before, ours = drawn[number]
        axes = ["data", "sequence"][-before.vertices.ndim :]
        name = "jax" if number < len(REGULAR) else "as numbered"
        panels += [(f"{title}, {name}", graph, axes, before)]
        panels += [(f"{title}, ours", graph, axes, ours)]
    draw_orders(panels).savefig(path, dpi=110)


if __name__ == "__main__":
    main()
