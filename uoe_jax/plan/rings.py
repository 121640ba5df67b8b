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
from uoe_jax.hardware.work import collectives
from uoe_jax.partition.legal import AXES
from uoe_jax.partition.rings import in_rings
from uoe_jax.partition.stand_in import jax_order, stand_ins
from uoe_jax.topology import from_topology, order_mesh
from uoe_jax.topology.rings import describe_order

_MOST = 512  # devices; orders of more take long, and aren't known then


def ring_steps(
    config: ExperimentConfig, sizes: Mapping[str, int], topology: Topology
) -> dict[str, RingStep]:
    """Return the steps of rings that a layout's programs walk, by axis.

    {} where there is none, where a switch joins the devices, or where there are too
    many of them to look for their order.
    """
    moved = list(collectives(config, sizes, chosen=True))
    walked = {c.axis for c in moved if c.kind == "collective_permute"}
    torus = topology.is_tpu and topology.num_devices <= _MOST
    if not walked or not torus:
        return {}
    axes = [axis for axis in AXES if sizes[axis] > 1]
    traffic = tuple(
        sum(c.num_bytes * c.count for c in moved if c.axis == axis) for axis in axes
    )
    shape = tuple(sizes[axis] for axis in axes)
    how = config.layout.device_order
    found = _steps(topology, shape, how, traffic if how == "ring" else ())
    return {
        axis: step for axis, step in zip(axes, found, strict=True) if axis in walked
    }


@functools.lru_cache(maxsize=4096)
def _steps(
    topology: Topology, shape: tuple[int, ...], how: str, traffic: tuple[float, ...]
) -> tuple[RingStep, ...]:
    graph, order = from_topology(topology), jax_order(topology, shape)
    if how == "auto":
        placed = np.empty(order.size, object)
        placed[:] = stand_ins(topology)
        found = in_rings(placed[order.ravel()].reshape(shape))
        order = np.array([chip.id for chip in found.flat]).reshape(shape)
    described = describe_order(graph, order)
    if how == "ring":  # built only: a search of every layout would take minutes
        described = order_mesh(graph, shape, traffic, start=order, moves=0)
    pairs = zip(described.worst, described.loads, strict=True)
    least = lambda number: float(max(number, 1))
    return tuple(RingStep(hops=least(hops), load=least(load)) for hops, load in pairs)
