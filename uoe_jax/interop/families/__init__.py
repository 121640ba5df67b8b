"""The architectures that are read and written, by their names in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uoe_jax.errors import DataError, nearest, shown
from uoe_jax.interop.families import bert, gpt2, llama, vit
from uoe_jax.interop.names import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (*llama.FAMILIES, *gpt2.FAMILIES, *bert.FAMILIES, *vit.FAMILIES)
}


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json; DataError for one that isn't read."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        for name in named:
            if isinstance(name, str) and name in FAMILIES:
                return FAMILIES[name]
        fix = nearest(str(named[0]), FAMILIES)
        raise DataError(f"{where}: architectures is {shown(named)}; {fix}")
    kind = config.get("model_type")
    found = [f for f in FAMILIES.values() if f.model_type == kind]
    if not found:
        known = sorted({f.model_type for f in FAMILIES.values()})
        fix = nearest(str(kind), known)
        raise DataError(f"{where}: model_type is {shown(kind)}; {fix}")
    return found[0]
