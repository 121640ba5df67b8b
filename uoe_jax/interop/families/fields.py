"""Fields of another library's config.json, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uoe_jax.errors import DataError, shown

Raw = Mapping[str, Any]
_MISSING: Any = object()


def read(raw: Raw, name: str, kind: type, default: Any = _MISSING) -> Any:
    """Return a field; where it is absent or null its default.

    Raises DataError if it has none, or is of another type than `kind`.
    """
    value = raw.get(name)
    if value is None:
        if default is _MISSING:
            raise DataError(f"config.json has no {name}; it must say it")
        return default
    number = kind is float and type(value) is int
    if type(value) is not kind and not number:
        words = f"it must be a {kind.__name__}"
        raise DataError(f"config.json: {name} is {shown(value)}; {words}")
    return float(value) if kind is float else value


def size(raw: Raw, name: str, default: Any = _MISSING) -> int:
    """Return a field that counts something; DataError for less than 1."""
    value = read(raw, name, int, default)
    if value < 1:
        raise DataError(f"config.json: {name} is {value}; it must be at least 1")
    return value


def only(raw: Raw, name: str, *known: Any) -> Any:
    """Return a field that has one of the known values, the first where it is absent.

    Raises DataError for another: it would change what the model computes.
    """
    value = raw.get(name, known[0])
    if value not in known:
        words = ", ".join(shown(k) for k in known)
        raise DataError(f"config.json: {name} is {shown(value)}; read are {words}")
    return value
