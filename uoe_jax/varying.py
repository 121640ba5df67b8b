"""Types of arrays inside `jax.shard_map`: over which mesh axes devices differ.

jax refuses to add or to loop over values whose types differ, and derives from a cast
the sum over devices that a replicated weight's gradient needs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Return the axes over which a value's type says that devices differ, sorted."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # its name depends on the release
    return tuple(sorted(aval.vma if kind is None else kind.varying))


def vary_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return x typed as differing over the axes, if it isn't already."""
    missing = tuple(sorted(set(axes) - set(varying_axes(x))))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arrays, each varying over the mesh axes that any of them varies over.

    Custom derivatives and loop carries need equal types.
    """
    axes = tuple({axis for array in arrays for axis in varying_axes(array)})
    return tuple(vary_over(array, axes) for array in arrays)


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return x varying over the mesh axes that `like` varies over."""
    return vary_over(x, varying_axes(like))


def zeros_varying(
    shape: tuple[int, ...], dtype: Any, like: jax.Array, fill: float = 0
) -> jax.Array:
    """Return a filled array that varies over the same mesh axes as `like`."""
    return vary_like(jnp.full(shape, fill, dtype), like)


def struct_varying(
    shape: tuple[int, ...], dtype: Any, like: jax.Array
) -> jax.ShapeDtypeStruct:
    """Return a kernel's output type that varies over the same mesh axes as `like`."""
    aval = jax.typeof(like)
    name = "manual_axis_type" if hasattr(aval, "manual_axis_type") else "vma"
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(aval, name)})
