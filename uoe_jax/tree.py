"""Leaves of a pytree by name: `trunk.blocks.0.attention.wq`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

Arrays = dict[str, np.ndarray]  # by name, on the host


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return a pytree path as a dotted name, without Flax's inner `value`."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
        if getattr(key, "name", None) != "value"
    ]
    return ".".join(parts)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a pytree by their dotted name."""
    return {
        leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def replace_leaves(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
    """Return a pytree with the named leaves replaced; the others stay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(leaf_name(path), leaf), tree
    )


def fill_leaves(template: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Return a pytree with every leaf replaced by the array of its name.

    Raises KeyError for a leaf that `arrays` lacks.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[leaf_name(path)], template
    )
