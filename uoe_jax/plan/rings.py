"""How far a ring's next device is in the order that a run would have. Imports no jax.

Only what a program sends round by itself depends on it: keys and values of ring
attention. Other collectives are the compiler's, which knows the torus.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.comms import RingStep
from uoe_jax.hardware.devices import Topology
from uoe_jax.partition.legal import AXES
from uoe_jax.partition.rings import Walks, in_best_rings, in_rings, ring_walks
from uoe_jax.partition.stand_in import jax_order, stand_ins
from uoe_jax.topology import from_topology
from uoe_jax.topology.rings import describe_order

_MOST = 512  # devices; orders of more take long, and aren't known then


def ring_steps(
    config: ExperimentConfig, sizes: Mapping[str, int], topology: Topology
) -> dict[str, RingStep]:
    """Return the steps of rings that a layout's programs walk, by axis.

    {} where there is none, where a switch joins the devices, or where there are too
    many of them to look for their order.
    """
    axes = [axis for axis in AXES if sizes[axis] > 1]
    walks = ring_walks(config, sizes, axes)
    torus = topology.is_tpu and topology.num_devices <= _MOST
    if not walks.axes or not torus:
        return {}
    shape = tuple(sizes[axis] for axis in axes)
    found = _steps(topology, shape, config.layout.device_order, walks)
    return {axes[number]: found[number] for number in walks.axes}


@functools.lru_cache(maxsize=4096)
def _steps(
    topology: Topology, shape: tuple[int, ...], how: str, walks: Walks
) -> tuple[RingStep, ...]:
    graph, order = from_topology(topology), jax_order(topology, shape)
    if how != "jax":
        placed = np.empty(order.size, object)
        placed[:] = stand_ins(topology)
        placed = placed[order.ravel()].reshape(shape)
        # Built only: a search of every layout would take minutes.
        ring = how == "ring"
        found = in_best_rings(placed, walks, 0) if ring else in_rings(placed, walks)
        order = np.array([chip.id for chip in found.flat]).reshape(shape)
    described = describe_order(graph, order)
    pairs = zip(described.worst, described.loads, strict=True)
    least = lambda number: float(max(number, 1))
    return tuple(RingStep(hops=least(hops), load=least(load)) for hops, load in pairs)
