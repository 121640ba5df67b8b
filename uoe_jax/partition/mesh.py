"""The device mesh of a run: one axis, `data`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError

DATA_AXIS = "data"


def make_mesh(
    config: MeshConfig,
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return the mesh; `batch_size` is what one pass splits over its devices.

    Raises ConfigError when there are too few devices or the batch doesn't divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = config.data or len(devices)
    if count > len(devices):
        raise ConfigError(
            f"mesh.data is {count} but {len(devices)} devices are visible; "
            f"use mesh.data {len(devices)} or less (0 takes all)"
        )
    if batch_size is not None and batch_size % count:
        fits = [n for n in range(1, len(devices) + 1) if batch_size % n == 0]
        above = -(-batch_size // count) * count
        raise ConfigError(
            f"a batch of {batch_size} doesn't divide over {count} devices; use "
            f"mesh.data {' or '.join(map(str, fits))}, or a batch of {above}"
        )
    return jax.make_mesh((count,), (DATA_AXIS,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose `axis` is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
