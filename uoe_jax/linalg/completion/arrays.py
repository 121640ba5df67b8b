"""Arrays a caller gives, refused in one line that names the first offender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.errors import DataError

MAX_INDEX = 2**31 - 2
FREE_SIZE = 10_000_000  # of a matrix whose shape isn't given and which is mostly empty


def as_indices(array: Any, name: str) -> Any:
    """Return `array` as integers in the library it came in, numpy for a list."""
    return check_indices(jnp if isinstance(array, jax.Array) else np, array, name)


def check_indices(library: Any, array: Any, name: str) -> Any:
    """Return `array` as integers; `library` is numpy or jax.numpy."""
    array = library.asarray(array)
    if array.ndim != 1:
        raise DataError(f"{name} has {array.ndim} dimensions; it must have 1")
    if library.issubdtype(array.dtype, library.integer):
        return array
    if not library.issubdtype(array.dtype, library.floating):
        example = array.ravel()[:1].tolist()
        raise DataError(
            f"{name} holds {array.dtype} such as {example}; indices must be integers"
        )
    if not bool((library.floor(array) == array).all()):
        bad = int(library.argmax(library.floor(array) != array))
        raise DataError(
            f"{name}[{bad}] is {float(array[bad])}; an index must be an integer"
        )
    return array.astype(np.int64 if library is np else np.int32)


def check_numbers(library: Any, array: Any, name: str, dtype: Any) -> Any:
    """Return `array` as finite numbers of `dtype`."""
    try:
        given = library.asarray(array)
        if given.dtype.kind in "cMmV":
            raise TypeError(f"they are {given.dtype}")
        with np.errstate(over="ignore"):
            array = given.astype(dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers: {error}") from None
    if array.ndim != 1:
        raise DataError(f"{name} has {array.ndim} dimensions; it must have 1")
    finite = library.isfinite(array)
    if not bool(finite.all()):
        bad = int(library.argmin(finite))
        count = int((~finite).sum())
        number = float(given[bad])
        if np.isfinite(number):
            raise _too_large(f"{name}[{bad}]", number, array.dtype)
        raise DataError(
            f"{name}[{bad}] is {number} ({count} such); drop entries that "
            "are not finite: what is unknown is left out"
        )
    # The sum of their squares is computed too.
    largest = float(abs(array).max()) if array.size else 0.0
    if largest > (float(np.finfo(array.dtype).max) / max(array.size, 1)) ** 0.5 / 16:
        raise _too_large(f"the largest of {name}", largest, array.dtype)
    return array


def _too_large(what: str, number: float, dtype: np.dtype) -> DataError:
    return DataError(
        f"{what} is {number:g}, whose square {dtype} can't sum; divide all by a power "
        "of ten" + (", or use float64" if dtype == np.float32 else "")
    )


def check_weights(library: Any, array: Any, dtype: Any) -> Any:
    """Return `array` as weights: finite, none negative, not all zero."""
    array = check_numbers(library, array, "weights", dtype)
    if array.size and float(array.min()) < 0:
        raise DataError(
            f"weights hold {float(array.min())}; a weight must not be negative"
        )
    if array.size and not float(array.max()):
        raise DataError("weights are all 0; at least one entry must count")
    return array


def check_range(
    rows: Any, cols: Any, shape: Sequence[SupportsIndex] | None
) -> tuple[int, int]:
    """Return the matrix's shape, the given one or the least that holds the indices."""
    if shape is not None and len(shape) != 2:
        raise DataError(f"shape is {tuple(shape)}; a matrix has two sizes")
    found = (int(rows.max()) + 1, int(cols.max()) + 1)
    for name, size in zip(("rows", "cols"), found, strict=True):
        if shape is None and size > max(FREE_SIZE, 1000 * len(rows)):
            raise DataError(
                f"{name} holds {size - 1}, of {len(rows)} entries; they count from 0: "
                f"np.unique({name}, return_inverse=True)[1] makes them of ids, or give "
                "the shape"
            )
    shape = found if shape is None else (int(shape[0]), int(shape[1]))
    for name, index, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise DataError(
                f"{name} holds {bad}; indices of a {shape[0]} x {shape[1]} matrix run "
                f"from 0 to {size - 1}"
            )
        if size > MAX_INDEX:
            raise DataError(f"{name} has size {size}; at most {MAX_INDEX} is supported")
    return shape
