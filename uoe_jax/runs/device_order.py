"""The order of a run's devices, kept in its folder: a resume has the same one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uoe_jax.errors import DataError
from uoe_jax.files import format_json, read_json, write_atomically

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from uoe_jax.partition.mesh import DeviceOrder

DEVICES = "devices.json"


def read_order(run_dir: Path, how: str) -> DeviceOrder | None:
    """Return the order of a run's devices; None: not recorded.

    An order that was asked for in another way isn't taken: `how` is
    `layout.device_order`.

    Raises:
      DataError: a record that can't be read.
    """
    file = run_dir / DEVICES
    if not file.exists():
        return None
    from uoe_jax.partition.mesh import DeviceOrder

    try:
        content = read_json(file)
        before = content["device_order"]
        found = DeviceOrder(dict(content["mesh"]), list(content["devices"]))
        if not all(type(n) is int for n in (*found.mesh.values(), *found.ids)):
            raise TypeError("devices aren't all numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} isn't a record of devices ({type(error).__name__}: {error}); "
            "delete it, and they are ordered anew"
        ) from None
    return found if before == how else None


def write_order(run_dir: Path, how: str, mesh: Mesh) -> None:
    """Record the ids of a mesh's devices, and how their order was found."""
    content = {
        "device_order": how,
        "mesh": dict(mesh.shape),
        "devices": [device.id for device in mesh.devices.flat],
    }
    write_atomically(run_dir / DEVICES, format_json(content, indent=1) + "\n")
