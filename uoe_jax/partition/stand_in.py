"""jax's own order of a topology's devices, asked on stand-ins: no device is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uoe_jax.hardware.devices import Topology

# What jax calls those that data sheets call otherwise.
_KINDS = {"TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite", "TPU v5p": "TPU v5"}


@dataclass(frozen=True)
class Chip:
    """What jax's order of devices, and ours, read of a TPU's device."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    process_index: int = 0


def stand_ins(topology: Topology) -> list[Chip]:
    """Return the devices of a TPU topology as jax lists them: x fastest, then y, z."""
    dimensions = topology.device.link.dimensions
    chips = (*topology.shape[-dimensions:], 1, 1)[:3]
    cores = topology.num_devices // int(np.prod(chips))
    kind = _KINDS.get(topology.device.name, topology.device.name)
    places = np.ndindex(chips[2], chips[1], chips[0], cores)
    return [
        Chip(number, (x, y, z), kind, core)
        for number, (z, y, x, core) in enumerate(places)
    ]


def jax_order(topology: Topology, shape: Sequence[int]) -> np.ndarray:
    """Return the numbers of a topology's devices as jax arranges them in a mesh.

    Devices in a switch stay in their order.
    """
    if not topology.is_tpu:
        return np.arange(topology.num_devices).reshape(tuple(shape))
    from jax.experimental import mesh_utils

    placed = mesh_utils.create_device_mesh(
        tuple(shape), stand_ins(topology), allow_split_physical_axes=True
    )
    return np.array([chip.id for chip in placed.flat]).reshape(tuple(shape))
