"""Choice of the backend that serves a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.ops import measured

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
            names = measured.prefer(op, names, shape)
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
