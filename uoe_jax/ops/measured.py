"""What measured fastest: tables of backends and tiles by device kind and shape.

A table is `tuning/<device or its generation>.json`, or the one that `uoe bench --tune`
wrote for this machine, which wins. An entry holds the shape it was measured at and the
finding; the nearest shape answers, and none does beyond `REACH` of them all.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jax

from uoe_jax.files import parse_json
from uoe_jax.hardware.gemm import FOLDER, user_folder

__all__ = ["FOLDER", "user_folder"]  # of what is measured here, read by others too

# A side of an entry may differ from the call's by this factor, either way.
REACH = 8
# Log ratios of the sides, added up: an entry this near is the shape's own.
CLOSE = 0.25


def device_kind() -> str:
    """Return what jax calls this process's device: `NVIDIA H200`."""
    return jax.devices()[0].device_kind


def device_name() -> str:
    """Return the name of this process's device in file names: `nvidia_h200`."""
    return re.sub("[^a-z0-9]+", "_", device_kind().lower()).strip("_")


def family_name() -> str:
    """Return the name of the device's generation: `sm_90` of an H100 and an H200."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else device_name()


@functools.cache
def load() -> dict[str, Any]:
    """Return this device's table: `order` and `tiles`, each by operation; {} if none.

    This machine's own, then the shipped one of the device, then of its generation.
    """
    shipped = resources.files("uoe_jax.ops") / "tuning"
    names = [f"{name}.json" for name in (device_name(), family_name())]
    for path in (user_folder() / names[0], *(shipped / name for name in names)):
        if path.is_file():
            return parse_json(path.read_bytes(), str(path))
    return {}


def prefer(op: str, names: Sequence[str], shape: Mapping[str, Any]) -> tuple[str, ...]:
    """Return backend names, those that measured faster near this shape first."""
    found = nearest(load().get("order", {}).get(op, ()), shape)
    first = [name for name in (found or {}).get("fastest", ()) if name in names]
    return (*first, *(name for name in names if name not in first))


def tiles(
    op: str, shape: Mapping[str, Any], within: float = math.inf
) -> dict[str, Any] | None:
    """Return the tile that measured fastest near this shape, or None.

    `within` is the most that the entry's `distance` may be.
    """
    found = nearest(load().get("tiles", {}).get(op, ()), shape)
    if found is None or distance(found["shape"], shape) > within:
        return None
    return found["tile"]


def nearest(
    entries: Sequence[Mapping[str, Any]], shape: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the entry whose shape is nearest in log scale; words must be equal."""
    best, least = None, math.inf
    for entry in entries:
        far = distance(entry["shape"], shape)
        if far < least:
            best, least = entry, far
    return best


def distance(known: Mapping[str, Any], shape: Mapping[str, Any]) -> float:
    """Return the sum of the sides' log ratios; infinite past reach or words apart."""
    total = 0.0
    for name, value in known.items():
        other = shape.get(name)
        if other is None:
            return math.inf
        if isinstance(value, (str, bool)):
            if value != other:
                return math.inf
            continue
        ratio = abs(math.log2(max(value, 1) / max(other, 1)))
        if ratio > math.log2(REACH):
            return math.inf
        total += ratio
    return total
