"""The order of a mesh's devices: jax's own, or one of shorter rings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uoe_jax.topology.boxes import box_hops, box_order
from uoe_jax.topology.rings import order_mesh
from uoe_jax.topology.sources import from_devices

_GAIN = 0.95  # of the hops of jax's order; less isn't worth another order
_HEAVIER = 8  # traffic of an axis over that of the axis before


def in_rings(placed: np.ndarray) -> np.ndarray:
    """Return a mesh's devices in an order of shorter rings, or as they are.

    The last axes talk most, so they count most. Devices that aren't a whole box of one
    slice stay where they are.
    """
    devices = placed.ravel().tolist()
    found = from_devices(devices)
    box = found[0].box if found else None
    if found is None or box is None or max(placed.shape) < 3:
        return placed
    place = found[1]
    weights = [float(_HEAVIER**axis) for axis in range(placed.ndim)]
    start = np.argsort(place).reshape(placed.shape)
    hops = box_hops(box, start)
    limit = _GAIN * sum(h * w for h, w in zip(hops, weights, strict=True))
    best = box_order(box, placed.shape, weights, limit)
    return placed if best is None else _take(devices, place[best])


def in_best_rings(placed: np.ndarray, traffic: Sequence[float]) -> np.ndarray:
    """Return a mesh's devices in the order of least hops, weighted by bytes of axes.

    Never one of more hops than as they are. Devices without coordinates, and those of
    several slices, stay where they are. The search takes a number of steps and not of
    seconds, so that all processes find the same order.
    """
    devices = placed.ravel().tolist()
    found = from_devices(devices)
    if found is None:
        return placed
    graph, place = found
    start = np.argsort(place).reshape(placed.shape)
    best = order_mesh(graph, placed.shape, traffic, start=start)
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
