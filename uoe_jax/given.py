"""A config that a function is given as itself, or as its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from uoe_jax.errors import ConfigError, nearest, shown


def one_of[Config](
    name: str, cls: type[Config], whole: Config | None, fields: Mapping[str, Any]
) -> Config:
    """Return a config that is given as itself or as its fields.

    Raises ConfigError for both at once, for another class's, and as `fill` does.
    """
    if whole is None:
        return fill(cls, **fields)
    if fields:
        raise ConfigError(
            f"{', '.join(fields)} with {name}; they are fields of it: give either"
        )
    if not isinstance(whole, cls):
        raise ConfigError(f"{name} is {shown(whole)}; expected {cls.__name__}")
    return whole


def fill(cls: Any, *others: Any, **values: Any) -> Any:
    """Return a dataclass of these fields; ConfigError names a field it hasn't.

    `others` are classes whose fields could have been given too.
    """
    known = [f.name for c in (cls, *others) for f in dataclasses.fields(c)]
    for name in values:
        if name not in known:
            raise ConfigError(f"no option {name!r}; {nearest(name, known)}")
    needed = [f.name for f in dataclasses.fields(cls) if _required(f)]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
