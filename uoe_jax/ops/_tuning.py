"""What measured fastest: tables of backends and tiles by device kind and shape.

A table is `tuning/<device or its generation>.json`, or the one that `uoe bench --tune`
wrote for this machine, which wins. An entry holds the shape it was measured at and the
finding; the nearest shape answers, and none does beyond `REACH` of them all.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from uoe_jax.files import parse_json

# A side of an entry may differ from the call's by this factor, either way.
REACH = 8
FOLDER = "UOE_TUNING_DIR"


def device_name() -> str:
    """Return the name of this process's device in file names: `nvidia_h200`."""
    kind = jax.devices()[0].device_kind
    return re.sub("[^a-z0-9]+", "_", kind.lower()).strip("_")


def family_name() -> str:
    """Return the name of the device's generation: `sm_90` of an H100 and an H200."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else device_name()


def user_folder() -> Path:
    """Return where `uoe bench --tune` writes tables: $UOE_TUNING_DIR or a cache.

    A user without a home has one among the temporary files.
    """
    if given := os.environ.get(FOLDER):
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:  # HOME unset, and a user without an entry
        home = Path(tempfile.gettempdir()) / f"uoe_jax-{os.getuid()}"
    return home / ".cache" / "uoe_jax" / "tuning"


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


def tiles(op: str, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the tile that measured fastest near this shape, or None."""
    found = nearest(load().get("tiles", {}).get(op, ()), shape)
    return None if found is None else found["tile"]


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
