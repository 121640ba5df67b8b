"""Observed entries from .npz, .csv and .parquet files."""

from __future__ import annotations

import csv
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uoe_jax.errors import DataError, nearest

KNOWN = (
    ("rows", "row", "user", "user_id", "userid", "u"),
    ("cols", "col", "column", "item", "item_id", "itemid", "movieid", "i"),
    ("values", "value", "rating", "ratings", "score", "r"),
)


class Table(NamedTuple):
    """Entries with compact indices, and the ids they stand for."""

    rows: np.ndarray  # [entries] position in row_ids
    cols: np.ndarray
    values: np.ndarray
    row_ids: np.ndarray  # [M] as in the file, ascending
    col_ids: np.ndarray
    names: tuple[str, ...]  # of the file's arrays these came from


def read_entries(path: Path, columns: tuple[str, str, str] | None = None) -> Table:
    """Return the entries of a file: a row id, a column id and a value each.

    Ids are integers and need not start anywhere or be consecutive. An .npz holds one
    array a column, or a single matrix whose NaN entries are unobserved.

    Args:
      path: a .npz, .csv or .parquet file.
      columns: names of the three columns; None: well-known names, else the first
        three if none is known.

    Raises:
      DataError: one line that names the file and the offender.
    """
    readers = {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(f"{path} ends in {path.suffix!r}; use .npz, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path} doesn't exist; give a file of entries")
    found = readers[kind](path)
    if len(found) == 1 and columns is None:
        return _from_matrix(path, *found.items())
    names = _pick_columns(path, list(found), columns)
    arrays = [found[name] for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 1:
            raise DataError(
                f"{path}: {name!r} has shape {list(array.shape)}; give one number for "
                "each entry"
            )
    lengths = [len(a) for a in arrays]
    if len(set(lengths)) > 1:
        raise DataError(
            f"{path}: columns {names} have lengths {lengths}; make them one"
        )
    if not lengths[0]:
        raise DataError(f"{path} has no entries; completion needs at least one")
    row_ids, rows = _ids(path, names[0], arrays[0])
    col_ids, cols = _ids(path, names[1], arrays[1])
    values = _values(path, names[2], _number(path, names[2], arrays[2]))
    return Table(rows, cols, values, row_ids, col_ids, tuple(names))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    damage = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        with zipfile.ZipFile(path):  # a renamed .npy would come as a bare array
            pass
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except damage as error:
        raise DataError(f"{path} can't be read as .npz: {error}") from None


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            sample = file.read(4096)
            file.seek(0)
            delimiter = max(",;\t", key=sample.partition("\n")[0].count)
            lines = [line for line in csv.reader(file, delimiter=delimiter) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read as .csv: {error}") from None
    if not lines:
        raise DataError(f"{path} is empty; completion needs at least one entry")
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise DataError(
                f"{path} line {number} has {len(line)} fields, line 1 has {width}"
            )
    header = lines[0]
    if all(_is_number(field) for field in header):
        header = [str(i) for i in range(width)]
    else:
        lines = lines[1:]
    columns = zip(*lines, strict=True) if lines else ([] for _ in header)
    names = [name.strip() for name in header]
    return {n: np.array(list(c)) for n, c in zip(names, columns, strict=True)}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError(f"{path} needs pyarrow; pip install pyarrow") from None
    try:
        table = read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as parquet: {error}") from None
    return {n: table[n].to_numpy() for n in table.column_names}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pick_columns(
    path: Path, found: list[str], asked: tuple[str, str, str] | None
) -> list[str]:
    if asked is not None:
        for name in asked:
            if name not in found:
                raise DataError(
                    f"{path} has no column {name!r}; {nearest(name, found)}"
                )
        return list(asked)
    lower = {name.lower(): name for name in found}
    picked = [
        next((lower[name] for name in names if name in lower), None) for names in KNOWN
    ]
    if None not in picked:
        return [str(name) for name in picked]
    if len(found) < 3:
        raise DataError(
            f"{path} has columns {found}; it needs a row, a column and a value"
        )
    # Three are taken in order; of more, a guess would take a time for a value.
    if len(found) > 3 and picked != [None] * 3:
        raise DataError(
            f"{path} has columns {found}; say which are row, column and value: "
            "--columns ROW COLUMN VALUE"
        )
    return found[:3]


def _number(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biufUSO":  # complex, times, records
        raise DataError(
            f"{path}: column {name!r} holds {array.dtype}; it must be numbers"
        )
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        held = array.tolist()
        bad = next((x for x in held if not _is_number(str(x))), held[0])
        raise DataError(
            f"{path}: column {name!r} holds {bad!r}; it must be numbers"
        ) from None


def _values(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise DataError(
            f"{path}: {name!r} of entry {bad + 1} is {values[bad]} "
            f"({int((~finite).sum())} such); drop entries that aren't finite: what is "
            "unknown is left out"
        )
    return values


def _ids(path: Path, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if array.dtype.kind in "US":  # digits of any length, before they are rounded
        try:
            array = array.astype(np.int64)
        except (ValueError, OverflowError):
            pass
    if not np.issubdtype(array.dtype, np.integer):
        numbers = _number(path, name, array)
        # Beyond 2^53 a float no longer tells neighbouring integers apart.
        whole = (np.floor(numbers) == numbers) & (np.abs(numbers) < 2**53)
        if not whole.all():
            bad = numbers[np.argmin(whole)]
            raise DataError(
                f"{path}: column {name!r} holds {bad}; ids must be integers"
            )
        array = numbers.astype(np.int64)
    ids, index = np.unique(array, return_inverse=True)
    return ids, index


def _from_matrix(path: Path, named: tuple[str, np.ndarray]) -> Table:
    name, matrix = named
    if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
        raise DataError(
            f"{path} holds one array of shape {matrix.shape} and type {matrix.dtype}; "
            "give a matrix with NaN where unobserved, or rows, cols and values"
        )
    rows, cols = np.nonzero(~np.isnan(matrix))
    if not rows.size:
        raise DataError(f"{path} has no entries; completion needs at least one")
    values = _values(path, name, matrix[rows, cols].astype(np.float64))
    row_ids, col_ids = (np.arange(size) for size in matrix.shape)
    return Table(rows, cols, values, row_ids, col_ids, (name,))
