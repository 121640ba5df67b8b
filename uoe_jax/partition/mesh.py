"""The device mesh of a run: its axes with more than one device, and always `data`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uoe_jax.config import ExperimentConfig, MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.partition.legal import AXES, check_layout, mesh_sizes

DATA_AXIS = "data"


def make_mesh(
    config: MeshConfig,
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return the mesh; `batch_size` is what one pass splits over data and fsdp.

    Raises ConfigError when there are too few devices or the batch doesn't divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
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
    # Auto outside of shard_map: there only elementwise updates and norms are left.
    return Mesh(placed, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mesh_for(
    config: ExperimentConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return the mesh of an experiment, checked against its model.

    Raises ConfigError with every reason why the model can't be laid out so.
    """
    devices = list(jax.devices() if devices is None else devices)
    batch = config.data.batch_size // config.train.accumulate
    mesh = make_mesh(config.mesh, batch_size=batch, devices=devices)
    check_layout(config, mesh_sizes(config.mesh, len(devices)))
    owners = {device.process_index for device in mesh.devices.flat}
    if len(owners) < len({device.process_index for device in devices}):
        raise ConfigError(
            f"mesh of {mesh.size} devices leaves some processes without one; use all "
            f"{len(devices)} devices"
        )
    return mesh


def evaluation_mesh(config: ExperimentConfig) -> Mesh:
    """Return the experiment's own mesh, or one device where there are too few."""
    devices = jax.devices()
    sizes = [config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence]
    if max(config.mesh.data, 1) * math.prod(sizes) > len(devices):
        return make_mesh(MeshConfig(data=1))
    return mesh_for(config, devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose `axis` is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
