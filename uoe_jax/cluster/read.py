"""Points from a .npz or .npy file, and the classes of a file that has some."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from uoe_jax.cluster.prepare import check_points
from uoe_jax.errors import DataError

_DAMAGE = (ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
_HOLDS = "give .npz with `points` [N, D] and, if known, `labels` [N], or .npy"


class Data(NamedTuple):
    """Points, a row each, and the class of each where the file knows it."""

    points: Float[np.ndarray, "N P"]
    classes: Shaped[np.ndarray, " N"] | None


def read_points(path: Path) -> Data:
    """Return `points` and `labels` of a file; without names, its only table.

    Raises DataError with the file and what is wrong in it.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        reason = error.strerror or "damaged"
        raise DataError(f"{path} can't be read ({reason}); {_HOLDS}") from error
    except _DAMAGE as error:
        raise DataError(f"{path} isn't a readable array file; {_HOLDS}") from error
    if isinstance(found, np.ndarray):
        return Data(_checked(path, found), None)
    with found:
        name = "points" if "points" in found.files else _only_table(path, found)
        points = _checked(path, _array(path, found, name))
        classes = None
        if "labels" in found.files and name != "labels":
            classes = _classes(path, _array(path, found, "labels"), len(points))
    return Data(points, classes)


def _array(path: Path, found: Any, name: str) -> np.ndarray:
    try:
        return found[name]
    except _DAMAGE as error:
        raise DataError(
            f"{path}: {name} can't be read: it holds Python objects or is damaged; "
            "save plain numbers"
        ) from error


def _only_table(path: Path, found: Any) -> str:
    """Return the name of the only array of two dimensions."""
    names = [n for n in found.files if _array(path, found, n).ndim == 2]
    if len(names) != 1:
        held = f"{len(names)} arrays of two dimensions: {', '.join(names)}"
        raise DataError(
            f"{path} has no `points` and {held if names else 'no table'}; {_HOLDS}"
        )
    return names[0]


def _checked(path: Path, points: np.ndarray) -> np.ndarray:
    try:
        return check_points(points)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _classes(path: Path, classes: np.ndarray, count: int) -> np.ndarray:
    if classes.shape != (count,):
        raise DataError(
            f"{path}: labels have shape {list(classes.shape)} and there are {count} "
            f"points; give one label a point, [{count}]"
        )
    if classes.dtype.kind not in "biufUS" or (
        classes.dtype.kind == "f" and not np.isfinite(classes).all()
    ):
        raise DataError(
            f"{path}: labels are of type {classes.dtype} or not finite; give whole "
            "numbers or text"
        )
    return classes
