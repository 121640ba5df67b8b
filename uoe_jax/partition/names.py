"""Names of a pytree's leaves."""

from __future__ import annotations

from typing import Any


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return a pytree path as `blocks.attention.wq`, without Flax's inner `value`."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
        if getattr(key, "name", None) != "value"
    ]
    return ".".join(parts)
