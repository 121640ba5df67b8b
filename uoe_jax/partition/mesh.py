"""The device mesh of a run: its axes with more than one device, and always `data`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uoe_jax.config import ExperimentConfig, MeshConfig
from uoe_jax.errors import ConfigError, all_divisors, choose
from uoe_jax.partition.legal import AXES, check_layout, layout_problems, mesh_sizes
from uoe_jax.partition.rings import in_best_rings, in_rings, ring_walks

DATA_AXIS = "data"


class DeviceOrder(NamedTuple):
    """The devices of a mesh: its axes' sizes, and the ids of its devices in order."""

    mesh: dict[str, int]
    ids: list[int]


def make_mesh(
    config: MeshConfig,
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    arrange: Callable[[np.ndarray, Sequence[str]], np.ndarray] | None = None,
) -> Mesh:
    """Return the mesh; `batch_size` is what one pass splits over data and fsdp.

    `arrange` puts devices that jax has placed in another order, given the axes' names.
    Of a part of the devices jax's order is kept.

    Raises ConfigError when there are too few devices or the batch doesn't divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    try:
        sizes = mesh_sizes(config, len(devices))
    except ConfigError as error:
        if "are visible" in str(error) and devices[0].platform == "cpu":
            needed = math.prod(max(getattr(config, axis), 1) for axis in AXES)
            hint = f"; uoe's --devices cpu:{needed} makes {needed} of a CPU"
            raise ConfigError(f"{error}{hint}") from None
        raise
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size is not None and batch_size % rows:
        fits = [n for n in range(1, len(devices) + 1) if batch_size % n == 0]
        above = -(-batch_size // rows) * rows
        raise ConfigError(
            f"a batch of {batch_size} doesn't divide over {rows} devices; use "
            f"mesh.data {' or '.join(map(str, fits))}, or a batch of {above}"
        )
    shape = {a: sizes[a] for a in AXES if sizes[a] > 1 or a == DATA_AXIS}
    count = math.prod(shape.values())
    # Eight of 4 x 4 x 4 chips are one dimension and half of the next.
    placed = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices[:count], allow_split_physical_axes=True
    )
    # Of a part it isn't known which ends are joined.
    if count == len(devices) and arrange is not None:
        placed = arrange(placed, tuple(shape))
    # Auto outside of shard_map: there only elementwise updates and norms are left.
    return Mesh(placed, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mesh_for(
    config: ExperimentConfig,
    devices: Sequence[jax.Device] | None = None,
    recorded: DeviceOrder | None = None,
) -> Mesh:
    """Return the mesh of an experiment, checked against its model.

    Devices stand as `layout.device_order` says, or as a run has recorded where the mesh
    and its devices are the same.

    Raises ConfigError with every reason why the model can't be laid out so.
    """
    devices = list(jax.devices() if devices is None else devices)
    batch = config.data.batch_size // config.train.accumulate

    def arrange(placed: np.ndarray, axes: Sequence[str]) -> np.ndarray:
        here = {device.id: device for device in placed.flat}
        shape = dict(zip(axes, placed.shape, strict=True))
        if recorded and recorded.mesh == shape and sorted(recorded.ids) == sorted(here):
            found = np.empty(placed.size, object)
            found[:] = [here[number] for number in recorded.ids]
            return found.reshape(placed.shape)
        return arranged(config, placed, axes)

    mesh = make_mesh(config.mesh, batch_size=batch, devices=devices, arrange=arrange)
    check_layout(config, mesh_sizes(config.mesh, len(devices)))
    owners = {device.process_index for device in mesh.devices.flat}
    if len(owners) < len({device.process_index for device in devices}):
        raise ConfigError(
            f"mesh of {mesh.size} devices leaves some processes without one; use all "
            f"{len(devices)} devices"
        )
    return mesh


def arranged(
    config: ExperimentConfig, placed: np.ndarray, axes: Sequence[str]
) -> np.ndarray:
    """Return a mesh's devices in the order that `layout.device_order` asks for."""
    sizes = {axis: 1 for axis in AXES} | dict(zip(axes, placed.shape, strict=True))
    walks = lambda: ring_walks(config, sizes, axes)
    orders = {
        "auto": lambda placed: in_rings(placed, walks()),
        "jax": lambda placed: placed,
        "ring": lambda placed: in_best_rings(placed, walks()),
    }
    name = "layout.device_order"
    return choose(name, config.layout.device_order, orders)(placed)


def evaluation_mesh(config: ExperimentConfig) -> Mesh:
    """Return a mesh to read a run on: its own as far as these devices and rows allow.

    A run says nothing of the devices it is read on, nor of the batches: `data` takes as
    many as divide the rows. One device where the model can't be laid out as it was.
    """
    devices, mesh = jax.devices(), config.mesh
    left = len(devices) // (mesh.fsdp * mesh.tensor * mesh.sequence)
    rows, rest = divmod(config.data.batch_size, config.train.accumulate * mesh.fsdp)
    if left < max(mesh.data, 1) or rows < 1 or rest:
        return make_mesh(MeshConfig(data=1))
    data = max(n for n in all_divisors(rows) if n <= (mesh.data or left))
    mesh = dataclasses.replace(mesh, data=data)
    config = dataclasses.replace(config, mesh=mesh)
    if any(layout_problems(config, mesh_sizes(mesh, len(devices)))):
        return make_mesh(MeshConfig(data=1))
    return mesh_for(config, devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose `axis` is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
