"""The order of a mesh's devices: jax's own, or one of shorter rings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.work import collectives
from uoe_jax.topology.boxes import box_hops, box_order
from uoe_jax.topology.graph import Graph
from uoe_jax.topology.rings import describe_order, order_mesh
from uoe_jax.topology.sources import from_devices

_GAIN = 0.95  # of the hops of jax's order; less isn't worth another order
# What an axis that isn't walked counts beside one that is: it decides between orders
# that are equal for the program.
_LESS = 1e-3
_COMPARED = 4096  # devices; of more only rings of single hops are taken


class Walks(NamedTuple):
    """The axes round which a program sends by itself, and what each axis counts."""

    traffic: tuple[float, ...]
    axes: tuple[int, ...]  # numbers of the walked ones


def ring_walks(
    config: ExperimentConfig, sizes: Mapping[str, int], axes: Sequence[str]
) -> Walks:
    """Return which of a mesh's axes the programs of an experiment walk.

    Those of a `collective_permute`, weighted by its bytes. Other collectives are the
    compiler's, which knows the torus. Where none is walked, each axis counts the bytes
    of its collectives.
    """
    sent, moved = dict.fromkeys(axes, 0.0), dict.fromkeys(axes, 0.0)
    for found in collectives(config, sizes, chosen=True):
        if found.axis not in moved:
            continue
        moved[found.axis] += found.num_bytes * found.count
        if found.kind == "collective_permute":
            sent[found.axis] += found.num_bytes * found.count
    walked = tuple(i for i, axis in enumerate(axes) if sent[axis] > 0)
    if not walked:
        return Walks(tuple(moved.values()), ())
    least = _LESS * min(n for n in sent.values() if n > 0)
    return Walks(tuple(n or least for n in sent.values()), walked)


def in_rings(placed: np.ndarray, walks: Walks) -> np.ndarray:
    """Return a mesh's devices in an order of shorter rings, or as they are.

    Never one in which a walked axis has more hops, a farther next device or a more
    loaded link. Devices that aren't a whole box of one slice stay where they are.
    """
    if max((placed.shape[axis] for axis in walks.axes), default=0) < 3:
        return placed
    devices = placed.ravel().tolist()
    found = from_devices(devices)
    if found is None or found[0].box is None:
        return placed
    graph, place = found
    start = np.argsort(place).reshape(placed.shape)
    best = box_order(found[0].box, placed.shape, walks.traffic)
    if best is None or not _shorter(graph, start, best, walks):
        return placed
    return _take(devices, place[best])


def _shorter(graph: Graph, start: np.ndarray, best: np.ndarray, walks: Walks) -> bool:
    assert graph.box is not None
    before, after = (box_hops(graph.box, order) for order in (start, best))
    total = lambda hops: sum(walks.traffic[axis] * hops[axis] for axis in walks.axes)
    # Single hops: no device is farther, and each link has one message. A mean just
    # above 1 hides one far device, for which each step waits.
    if all(after[axis] <= 1 for axis in walks.axes):
        return total(after) < total(before)
    if total(after) > _GAIN * total(before):
        return False
    return graph.size <= _COMPARED and _no_worse(graph, start, best, walks)


def _no_worse(graph: Graph, start: np.ndarray, best: np.ndarray, walks: Walks) -> bool:
    """Whether no walked axis has more hops, a farther next device or more load."""
    before, after = (describe_order(graph, order) for order in (start, best))
    return all(
        after.hops[axis] <= before.hops[axis] + 1e-9
        and after.worst[axis] <= before.worst[axis] + 1e-9
        and after.loads[axis] <= before.loads[axis]
        for axis in walks.axes
    )


def in_best_rings(
    placed: np.ndarray, walks: Walks, moves: int | None = None
) -> np.ndarray:
    """Return a mesh's devices in the order of least hops, weighted by what axes count.

    Never one of more hops than as they are, nor one that `in_rings` would refuse.
    Devices without coordinates, of several slices or in parts that no link joins stay
    where they are. The search takes a number of steps (`moves`) and not of seconds, so
    that all processes find the same order.
    """
    devices = placed.ravel().tolist()
    found = from_devices(devices)
    if found is None or len(found[0].components()) > 1:
        return placed
    graph, place = found
    start = np.argsort(place).reshape(placed.shape)
    best = order_mesh(graph, placed.shape, walks.traffic, start=start, moves=moves)
    if not _no_worse(graph, start, best.vertices, walks):
        return placed
    return _take(devices, place[best.vertices])


def _take(devices: Sequence[object], places: np.ndarray) -> np.ndarray:
    result = np.empty(places.shape, object)
    for index, place in np.ndenumerate(places):
        result[index] = devices[place]
    return result


def mean_hops(placed: np.ndarray) -> list[float]:
    """Return the mean links between neighbours of each axis' rings; 0 for one device.

    Raises ValueError where the devices aren't a whole box of one slice.
    """
    found = from_devices(placed.ravel().tolist())
    box = found[0].box if found else None
    if found is None or box is None:
        raise ValueError("the devices aren't a box of one slice")
    return box_hops(box, np.argsort(found[1]).reshape(placed.shape))
