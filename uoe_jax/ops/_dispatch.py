"""Choice of backend, and the few helpers that every backend shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.ops import _tuning

# Backends that have served each operation in this process, in order: runs tell it.
served: dict[str, dict[str, None]] = {}


def dispatch(
    op: str,
    backends: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    shape: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Return `op` computed by the named backend, or by the fastest that can serve.

    A backend says that it can't by raising `NotImplementedError(reason)`. What is
    fastest is looked up by `shape`; where nothing was measured near it, the order of
    `backends` decides.

    Raises:
      ConfigError: unknown name, or a named backend that can't serve this call.
    """
    if implementation is None:
        names = tuple(backends)
        if shape is not None:
            names = _tuning.prefer(op, names, shape)
    elif implementation in backends:
        names = (implementation,)
    else:
        raise ConfigError(
            f"{op} implementation is {implementation!r}; "
            + nearest(implementation, backends)
        )
    reasons = []
    for name in names:
        try:
            found = backends[name](*args, **kwargs)
            served.setdefault(op, {})[name] = None
            return found
        except NotImplementedError as error:
            reasons.append(f"{name} can't serve this call ({error})")
    others = ", ".join(name for name in backends if name not in names)
    fix = f"use {others} or None" if others else "change the shapes"
    raise ConfigError(f"{op}: {'; '.join(reasons)}; {fix}")


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arrays, each varying over the mesh axes that any of them varies over.

    Inside `jax.shard_map` custom derivatives and loop carries need equal types; the
    cast's own transpose is the sum over devices that a replicated weight needs.
    """
    axes = frozenset().union(*(_varying(array) for array in arrays))
    return tuple(_cast(array, axes) for array in arrays)


def zeros_varying(
    shape: tuple[int, ...], dtype: Any, like: jax.Array, fill: float = 0
) -> jax.Array:
    """Return a filled array that varies over the same mesh axes as `like`."""
    return _cast(jnp.full(shape, fill, dtype), _varying(like))


def vary_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array that varies over the mesh axes that `like` varies over."""
    return _cast(array, _varying(like))


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype sums are kept in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def _varying(array: jax.Array) -> frozenset:
    """Return the manual mesh axes over which an array differs between devices."""
    aval = jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)
    return aval.vma if kind is None else kind.varying  # its name depends on the release


def _cast(array: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(sorted(axes - _varying(array)))
    return lax.pcast(array, missing, to="varying") if missing else array
