"""Graphs of devices, and what follows from them: numpy only, no jax.

| name | does |
|---|---|
| `from_topology`, `from_devices`, `from_coordinates`, `from_nvidia_smi`, `read_graph` | device graphs (`sources`) |
| `make_graph`, `box_graph`, `Graph` | any weighted graph (`graph`) |
| `order_mesh`, `RingOrder` | ring orders of a mesh, weighted by bytes (`rings`) |
| `place_experts`, `Placement` | experts near those they are chosen with (`place`) |
| `decompose` | buffered cop decomposition (`cops`) |
| `partition` | shortcut partition (`shortcut`) |
| `cover` | trees that keep distances (`trees`) |
| `make_oracle` | distances from trees in constant time (`oracle`) |
| `steiner` | a small graph of terminals (`contract`) |

The last five are of Chang, Conroy, Le, Milenkovic, Solomon, Than 2024, "Shortcut
Partitions in Minor-Free Graphs" (arXiv 2308.00555).
"""  # noqa: E501

from uoe_jax.topology.contract import steiner
from uoe_jax.topology.cops import decompose
from uoe_jax.topology.graph import Graph, box_graph, make_graph
from uoe_jax.topology.oracle import Oracle, make_oracle
from uoe_jax.topology.place import Placement, place_experts
from uoe_jax.topology.rings import RingOrder, order_mesh
from uoe_jax.topology.shortcut import partition
from uoe_jax.topology.sources import (
    from_coordinates,
    from_devices,
    from_nvidia_smi,
    from_topology,
    read_graph,
)
from uoe_jax.topology.trees import TreeCover, cover

__all__ = [
    "Graph",
    "Oracle",
    "Placement",
    "RingOrder",
    "TreeCover",
    "box_graph",
    "cover",
    "decompose",
    "from_coordinates",
    "from_devices",
    "from_nvidia_smi",
    "from_topology",
    "make_graph",
    "make_oracle",
    "order_mesh",
    "partition",
    "place_experts",
    "read_graph",
    "steiner",
]
