"""Observed entries: checked, cleaned, and split for validation. Host or device.

A bad array is refused in one line that names the first offender.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.errors import ConfigError, DataError, shown

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
        number = float(np.asarray(given[bad]).astype(np.float64))  # None is NaN
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


def two_sizes(shape: Any) -> tuple[int, int]:
    """Return a matrix's sizes as numbers."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 2:
        raise DataError(f"shape is {shown(shape)}; a matrix has two sizes")
    return sizes


def check_range(
    rows: Any, cols: Any, shape: Sequence[SupportsIndex] | None
) -> tuple[int, int]:
    """Return the matrix's shape, the given one or the least that holds the indices."""
    if shape is not None:
        shape = two_sizes(shape)
    found = (int(rows.max()) + 1, int(cols.max()) + 1)
    for name, size in zip(("rows", "cols"), found, strict=True):
        if shape is None and size > max(FREE_SIZE, 1000 * len(rows)):
            raise DataError(
                f"{name} holds {size - 1}, of {len(rows)} entries; they count from 0: "
                f"np.unique({name}, return_inverse=True)[1] makes them of ids, or give "
                "the shape"
            )
    shape = found if shape is None else shape
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


@dataclass(frozen=True)
class Entries:
    """Distinct observed entries of a matrix, all in one array library.

    numpy arrays stay on the host until they are laid out; jax arrays never leave
    their device.
    """

    rows: Any  # [entries] int32
    cols: Any  # [entries] int32
    values: Any  # [entries] floating
    weights: Any  # [entries] floating, or None for ones
    shape: tuple[int, int]
    num_duplicates: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.values.shape[0])

    @property
    def transpose(self) -> Entries:
        """The entries of the transposed matrix."""
        return dataclasses.replace(
            self, rows=self.cols, cols=self.rows, shape=self.shape[::-1]
        )

    def take(self, where: Any) -> Entries:
        """Return the entries that a mask or an index array picks."""
        weights = None if self.weights is None else self.weights[where]
        return dataclasses.replace(
            self,
            rows=self.rows[where],
            cols=self.cols[where],
            values=self.values[where],
            weights=weights,
        )


def clean_entries(
    rows: Any,
    cols: Any,
    values: Any,
    shape: Sequence[SupportsIndex] | None = None,
    *,
    weights: Any = None,
    duplicates: str = "mean",
    dtype: Any = np.float32,
) -> Entries:
    """Check observed entries and return them with every position at most once.

    Args:
      rows: row of each entry, from 0.
      cols: column of each entry, from 0.
      values: value of each entry, finite.
      shape: of the matrix; None takes one more than the largest indices.
      weights: of each entry in the squared error, finite and not negative.
      duplicates: "mean" replaces entries at one position by their weighted mean with
        the summed weight (host arrays only); "error" rejects them.
      dtype: of the values.

    Raises:
      DataError: one line that names the first offender.
    """
    if duplicates not in ("mean", "error"):
        raise ConfigError(f"duplicates is {duplicates!r}; use 'mean' or 'error'")
    on_device = any(isinstance(x, jax.Array) for x in (rows, cols, values))
    library = jnp if on_device else np
    rows = check_indices(library, rows, "rows")
    cols = check_indices(library, cols, "cols")
    values = check_numbers(library, values, "values", dtype)
    if weights is not None:
        weights = check_weights(library, weights, dtype)
    lengths = [len(x) for x in (rows, cols, values, weights) if x is not None]
    if len(set(lengths)) > 1:
        raise DataError(
            f"rows, cols, values (and weights) have lengths {lengths}; give one of "
            "each for every entry"
        )
    if not lengths[0]:
        raise DataError("there are 0 entries; completion needs at least one")
    shape = check_range(rows, cols, shape)
    rows, cols = rows.astype(np.int32), cols.astype(np.int32)
    entries = Entries(rows, cols, values, weights, shape)
    return _merge_on_device(entries) if on_device else _merge(entries, duplicates)


def _merge(entries: Entries, duplicates: str) -> Entries:
    """Return entries with one value a position, the weighted mean of its values."""
    key = entries.rows.astype(np.int64) * entries.shape[1] + entries.cols
    ordered = np.sort(key)
    if not (ordered[1:] == ordered[:-1]).any():
        return entries
    unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    repeated = len(key) - len(unique)
    if duplicates == "error":
        raise _duplicate_error(entries, ordered, repeated)
    weights = entries.weights
    weights = np.ones(len(key)) if weights is None else weights.astype(np.float64)
    total = np.bincount(inverse, weights)
    mean = np.bincount(inverse, weights * entries.values) / np.where(total, total, 1)
    kept = entries.take(first)
    dtype = entries.values.dtype
    return dataclasses.replace(
        kept,
        values=mean.astype(dtype),
        weights=total.astype(dtype),
        num_duplicates=repeated,
    )


def _duplicate_error(entries: Entries, ordered: Any, repeated: int) -> DataError:
    bad = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
    row, col = divmod(bad, entries.shape[1])
    return DataError(
        f"position ({row}, {col}) occurs more than once ({repeated} repeats); use "
        "duplicates='mean' or drop them"
    )


def _merge_on_device(entries: Entries) -> Entries:
    rows, cols = jax.lax.sort((entries.rows, entries.cols), num_keys=2)
    same = (rows[1:] == rows[:-1]) & (cols[1:] == cols[:-1])
    if bool(same.any()):
        bad = int(jnp.argmax(same))
        raise DataError(
            f"position ({int(rows[bad])}, {int(cols[bad])}) occurs more than once "
            f"({int(same.sum())} repeats); pass numpy arrays to have them averaged"
        )
    return entries


def split_entries(
    entries: Entries, fraction: float, seed: int
) -> tuple[Entries, Entries]:
    """Return (kept, held out), the second a random `fraction` of the entries."""
    count = round(fraction * entries.size)
    if not 0 < fraction < 1 or not 0 < count < entries.size:
        raise ConfigError(
            f"holdout is {fraction} of {entries.size} entries; it must be in (0, 1) "
            "and leave at least one entry on each side"
        )
    order = np.random.default_rng(seed).permutation(entries.size)
    return entries.take(np.sort(order[count:])), entries.take(np.sort(order[:count]))
