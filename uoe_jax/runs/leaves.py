"""JSON as its leaves: paths, kinds and values, in an order of their own.

The order of an object's keys doesn't matter, so leaves come sorted by path.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from uoe_jax.errors import DataError, nearest, shown
from uoe_jax.files import MAX_DEPTH

MAX_LEAVES = 100_000  # of one object
MAX_TEXT = 1 << 20  # characters of one string
LENGTH = -1  # a step beside a list's positions: how many items it has
_EXACT = 2**53  # beyond it float64 leaves out whole numbers

# A key of an object, the position in a list, or LENGTH.
Path = tuple[str | int, ...]


class Leaf(NamedTuple):
    """A scalar of a JSON value, an empty object or list, or a list's length."""

    path: Path
    kind: str  # null, truth, number, whole (beyond 2^53), odd (NaN), text, empty
    value: Any


def leaves_of(value: Any, sets: frozenset[Path] = frozenset()) -> list[Leaf]:
    """Return the leaves of a JSON value, sorted by path; equal values give equal lists.

    Items of the lists at `sets` all have position 0. Raises DataError, one line, for
    what JSON has no form for, and beyond the limits of depth, leaves and text.
    """
    found: list[Leaf] = []
    _visit(value, (), found, sets)
    return found


def _visit(value: Any, path: Path, found: list[Leaf], sets: frozenset[Path]) -> None:
    if len(path) > MAX_DEPTH:
        raise DataError(
            f"the value at {show_path(path[:4])}... has more than {MAX_DEPTH} levels; "
            "flatten it"
        )
    if isinstance(value, Mapping):
        for key, child in _sorted_items(value, path):
            _visit(child, (*path, key), found, sets)
        if not value:
            found.append(Leaf(path, "empty", "{}"))
    elif isinstance(value, (list, tuple)):
        if not value:
            found.append(Leaf(path, "empty", "[]"))
            return
        found.append(Leaf((*path, LENGTH), "number", float(len(value))))
        ordered = path not in sets
        for place, child in enumerate(value):
            _visit(child, (*path, place if ordered else 0), found, sets)
    else:
        found.append(Leaf(path, *_scalar(value, path)))
    if len(found) > MAX_LEAVES:
        raise DataError(
            f"the object has more than {MAX_LEAVES:,} leaves; leave long lists out"
        )


def _sorted_items(value: Mapping[Any, Any], path: Path) -> list[tuple[str, Any]]:
    items: dict[str, Any] = {}
    for key, child in value.items():
        if not isinstance(key, str):
            raise DataError(
                f"{show_path(path)} has the key {shown(key)}; JSON's keys are strings"
            )
        name = key if key.isascii() else unicodedata.normalize("NFC", key)
        if name in items:
            raise DataError(f"{show_path(path)} has the key {shown(name)} twice")
        items[name] = child
    return sorted(items.items())


def _scalar(value: Any, path: Path) -> tuple[str, Any]:
    """Return a scalar's kind and its settled value."""
    if value is None:
        return "null", None
    if isinstance(value, bool):  # before int, which it is too
        return "truth", value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise DataError(
                f"the text at {show_path(path)} has {len(value):,} characters; at most "
                f"{MAX_TEXT:,} are encoded"
            )
        text = value if value.isascii() else unicodedata.normalize("NFC", value)
        return "text", text
    if isinstance(value, int):
        return ("number", float(value)) if abs(value) <= _EXACT else ("whole", value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "odd", repr(float(value))
        return "number", float(value) + 0.0  # -0.0 is 0
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _scalar(value.item(), path)
    kind = type(value).__name__
    raise DataError(f"{show_path(path)} is a {kind}; JSON has no form for it")


def settings_of(value: Any) -> dict[Path, Any]:
    """Return what a person calls settings: leaves, but lists of scalars whole.

    Lists come as tuples.
    """
    return dict(_settings(value, ()))


def _settings(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in _sorted_items(value, path):
            yield from _settings(child, (*path, key))
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Mapping, list, tuple)) for item in value
    ):
        for place, child in enumerate(value):
            yield from _settings(child, (*path, place))
    else:
        yield path, tuple(value) if isinstance(value, list) else value


def show_path(path: Path) -> str:
    """Return a path as a person writes it: `model.layers[3].kind`."""
    text = ""
    for step in path:
        if isinstance(step, str):
            text += f".{step}" if text else step
        else:
            text += ".length" if step == LENGTH else f"[{step}]"
    return text or "the value"


def parse_path(text: str) -> Path:
    """Return the path that `show_path` writes; a key may also stand as `.3`."""
    path: list[str | int] = []
    for part in text.split("."):
        key, *places = part.split("[")
        if key:
            path.append(key)
        for place in places:
            digits = place.removesuffix("]")
            if not (place.endswith("]") and digits.isascii() and digits.isdigit()):
                raise DataError(f"the path {shown(text)} can't be read; write a.b[0].c")
            path.append(int(digits))
    return tuple(path)


def find_setting(name: str, known: Mapping[Path, Any] | set[Path]) -> Path:
    """Return the setting a person means: a whole path, or its end where that is clear.

    Raises DataError, naming the nearest, for none or several.
    """
    by_name = {show_path(path): path for path in known}
    if name in by_name:
        return by_name[name]
    ends = sorted(full for full in by_name if full.endswith(f".{name}"))
    if len(ends) == 1:
        return by_name[ends[0]]
    if ends:
        raise DataError(f"{shown(name)} is {' or '.join(ends[:4])}; write which")
    raise DataError(f"no run has a setting {shown(name)}; {_close(name, by_name)}")


def _close(name: str, known: Mapping[str, Path]) -> str:
    said = nearest(name, known)
    return said if len(said) < 200 else "uoe runs explain A B shows names"
