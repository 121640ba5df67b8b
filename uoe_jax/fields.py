"""What a field of a config may hold: its type, and bounds as `Annotated` metadata.

A dataclass that inherits `Checked` refuses wrong types, unknown literals and numbers
that aren't finite when it is made. `range_problems` finds numbers out of their bounds.
Imports no jax.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from uoe_jax.errors import ConfigError, shown
from uoe_jax.files import local_path
from uoe_jax.stores.objects import address_of

INT32_MAX = 2**31 - 1  # sizes and ids are 32-bit integers on a device
FLOAT_MAX, FLOAT_MIN = 1e30, 1e-30  # well within float32


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A number's range: `least` to `most`, or above and below what it can't reach."""

    least: int | float = -math.inf
    most: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf

    def problem(self, value: int | float) -> str | None:
        """Return the rule that a number breaks as "it must be ...", or None."""
        if self.least <= value <= self.most and self.above < value < self.below:
            return None
        if math.isfinite(self.below):
            first = f"({self.above:g}" if self.above == 0 else f"[{self.least:g}"
            return f"it must be in {first}, {self.below:g})"
        if value <= self.above:
            return "it must be positive"
        if value < self.least == 0:
            return "it must not be negative"
        if self.least > -math.inf and self.most < INT32_MAX:
            return f"it must be {shown(self.least)} to {shown(self.most)}"
        if value < self.least:
            return f"it must be at least {shown(self.least)}"
        return f"it must be at most {shown(self.most)}"


@dataclass(frozen=True)
class PathComponent:
    """A text that becomes a file's or folder's name: no separators, no dots alone."""

    limit: int = 120  # bytes; file systems take 255, and endings are added

    def problem(self, value: str) -> str | None:
        """Return the rule that a name breaks, or None."""
        if not value.strip():
            return "it names a folder, so it can't be empty"
        if "/" in value or "\\" in value or value in (".", "..") or ":" in value[1:2]:
            return "it names one folder: use a name without / and \\, not a path"
        if not value.isprintable():
            return "it names a folder: use printable characters only"
        if len(value.encode()) > self.limit:
            return f"it names a folder: use at most {self.limit} bytes"
        return None


@dataclass(frozen=True)
class Known:
    """A literal that may also be any key of a table, to which users can add."""

    table: Mapping[str, Any] = dataclasses.field(repr=False)

    def __hash__(self) -> int:
        return id(self.table)


Count = Annotated[int, Bounds(least=1, most=INT32_MAX)]
Whole = Annotated[int, Bounds(least=0, most=INT32_MAX)]
Bytes = Annotated[int, Bounds(least=1, most=2**62)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]  # of 32 bits: others repeat
Positive = Annotated[float, Bounds(above=0, least=FLOAT_MIN, most=FLOAT_MAX)]
NotNegative = Annotated[float, Bounds(least=0, most=FLOAT_MAX)]
Fraction = Annotated[float, Bounds(least=0, below=1)]
Name = Annotated[str, PathComponent()]

_DEFAULT = {
    int: Bounds(least=-INT32_MAX, most=INT32_MAX),
    float: Bounds(least=-FLOAT_MAX, most=FLOAT_MAX),
}


class Checked:
    """Base of dataclasses whose fields hold what their annotations say.

    Scalars of numpy become Python's, whole numbers become floats where a float is due,
    lists become tuples. Raises ConfigError for anything else. What is printed of one is
    what differs from the defaults.
    """

    def __init_subclass__(cls) -> None:
        # `dataclass` leaves a class the __repr__ that it has.
        cls.__repr__ = Checked.__repr__

    def __repr__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != _default(field)
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def __post_init__(self) -> None:
        """Check and settle every field."""
        for name, hint in field_hints(type(self)).items():
            value = getattr(self, name)
            found = convert(hint, value, f"{type(self).__name__}.{name}")
            if found is not value:
                object.__setattr__(self, name, found)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def field_hints(cls: type) -> Mapping[str, Any]:
    """Return the annotation of every field, its bounds included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def convert(hint: Any, value: Any, where: str) -> Any:
    """Return a value in the form its annotation asks for; raise ConfigError if not it.

    Names are checked here too: they become paths before anything else is looked at.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        tables = [rule.table for rule in args[1:] if isinstance(rule, Known)]
        if tables:
            value = _plain(value)
            if isinstance(value, str) and value in tables[0]:
                return str.__str__(value)
            raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}")
        found = convert(args[0], value, where)
        for rule in args[1:]:
            if isinstance(rule, PathComponent) and (broken := rule.problem(found)):
                raise ConfigError(f"{where} is {shown(found)}; {broken}")
        return found
    if hasattr(hint, "checked"):  # a class that checks its own values
        return hint.checked(value, where)
    if origin is tuple:
        return _tuple(hint, args, value, where)
    if origin is dict:
        return _dict(hint, args, value, where)
    if origin in (types.UnionType, typing.Union):
        return _union(hint, args, value, where)
    return value if hint is Any else _scalar(hint, _plain(value), where)


def _plain(value: Any) -> Any:
    """Return a scalar of numpy as Python's, an enum's member as its value."""
    if isinstance(value, enum.Enum):
        value = value.value
    # By name, as this module doesn't import numpy.
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, str) and type(value) is not str:
        value = str.__str__(value)  # an enum's member
    if typing.get_origin(hint) is Literal:
        # No `in`: an array compared with a word is an array.
        if isinstance(value, str) and value in typing.get_args(hint):
            return value
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return _finite(value, where)
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return value if type(value) is int else int(value)
    elif hint is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(text, str):
            if "\0" in text:
                raise ConfigError(
                    f"{where} is {shown(text)}; it holds a NUL character, which no "
                    "name, path or text here can"
                )
            return text
    elif hint is Path:
        if isinstance(value, (str, os.PathLike)):
            # A run may lie in a store; who reads files refuses that by `local_path`.
            stored = address_of(value) is not None
            return Path(value) if stored else local_path(value, where)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}")


def _finite(value: Any, where: str) -> float:
    try:
        found = float(value)
    except (OverflowError, ValueError):
        found = math.inf
    if not math.isfinite(found):
        raise ConfigError(f"{where} is {shown(value)}; it must be a finite number")
    return found


def _tuple(hint: Any, args: tuple, value: Any, where: str) -> Any:
    if not isinstance(value, (tuple, list)):
        fix = f", write ({shown(value)},)" if isinstance(value, str) else ""
        raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}{fix}")
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(kinds) != len(value) or not value:
        raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}")
    return tuple(convert(kind, v, where) for kind, v in zip(kinds, value, strict=True))


def _dict(hint: Any, args: tuple, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}")
    return {
        convert(args[0], k, f"a key of {where}"): convert(
            args[1], v, f"{where}[{shown(k)}]"
        )
        for k, v in value.items()
    }


def _union(hint: Any, args: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    if len(kinds) == 1:
        return convert(kinds[0], value, where)
    if Path in kinds and str not in kinds and isinstance(value, (str, os.PathLike)):
        return convert(Path, value, where)  # which says what is wrong with a path
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {shown(value)}; expected {describe(hint)}")


def describe(hint: Any) -> str:
    """Return an annotation in words: "int", "one of 'a', 'b'", "a tuple of int"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        tables = [rule.table for rule in args[1:] if isinstance(rule, Known)]
        if tables:
            names = ", ".join(map(repr, tables[0]))
            return f"one of {names}, or your own once its module is imported"
        return describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        inner = " and ".join(describe(a) for a in args if a is not Ellipsis)
        return f"a tuple, not empty, of {inner}"
    if origin is dict:
        return f"a dict of {describe(args[0])} to {describe(args[1])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in args)
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield each number of a dataclass that is out of its bounds, as "value, rule".

    Fields are named `prefix` + name, those of a part after a dot.
    """
    for name, hint in field_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from range_problems(value, f"{prefix}{name}.")
        else:
            yield from out_of_bounds(hint, value, prefix + name)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ConfigError with every number that is out of its bounds, in one line."""
    if problems := list(range_problems(config, prefix)):
        raise ConfigError("; ".join(problems))


def out_of_bounds(hint: Any, value: Any, path: str) -> Iterator[str]:
    """Yield what is wrong with the numbers of one field, by its annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None or isinstance(value, (str, bool)):
        return
    if origin is Annotated and not any(isinstance(a, Bounds) for a in args):
        yield from out_of_bounds(args[0], value, path)
    elif isinstance(value, (tuple, list)) and origin is tuple:
        for item in value:
            yield from out_of_bounds(args[0], item, path)
    elif isinstance(value, Mapping) and origin is dict:
        for key, item in value.items():
            yield from out_of_bounds(args[1], item, f"{path}[{shown(key)}]")
    elif origin in (types.UnionType, typing.Union):
        kinds = [a for a in args if _kind(a) is type(value)] or [type(value)]
        yield from out_of_bounds(kinds[0], value, path)
    elif isinstance(value, (int, float)):
        rules = [a for a in args[1:] if isinstance(a, Bounds)] if args else []
        for rule in rules or [_DEFAULT[type(value)]]:
            if broken := rule.problem(value):
                yield f"{path} is {shown(value)}; {broken}"


def _kind(hint: Any) -> Any:
    """Return the type of a hint's values: of a tuple or dict without what it holds."""
    origin = typing.get_origin(hint)
    return typing.get_args(hint)[0] if origin is Annotated else origin or hint
