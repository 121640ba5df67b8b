"""Observed entries of a matrix (row id, column id, value) from files of many kinds.

In four steps: a file's bytes, unpacked; the columns in them; the three columns that are
meant (roles.py); ids and values, where a mistake is named by its line (fields.py).
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.data.columns import Columns, Matrix, entry_name, open_binary, to_arrow
from uoe_jax.data.delimited import read_delimited
from uoe_jax.data.fields import distinct_ids, finite_values
from uoe_jax.data.roles import are_names, pick_columns
from uoe_jax.errors import ConfigError, DataError, UoeError, extra_packages

with extra_packages():
    import pyarrow as pa
    import pyarrow.compute

pc: Any = pyarrow.compute  # whose functions are made at run time

# What a packed or binary file begins with, and the ending that says so.
PACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
FREE_SIZE = 10_000_000  # of a matrix that is mostly empty
BINARY = (".npz", ".npy", ".parquet", ".gz", ".bz2", ".xz", ".zip")
DAMAGE = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowException),
)


class Table(NamedTuple):
    """Entries with compact indices, and the ids they stand for."""

    rows: np.ndarray  # [entries] position in row_ids
    cols: np.ndarray
    values: np.ndarray
    row_ids: np.ndarray  # [M] as in the file, ascending: integers or strings
    col_ids: np.ndarray
    names: tuple[str, ...]  # of the file's columns these came from
    notes: tuple[str, ...] = ()  # what was assumed about the file


class Pairs(NamedTuple):
    """Positions to predict, by ids and by place among the ids of a fit."""

    rows: np.ndarray  # [pairs] place among the fit's row ids; -1: not there
    cols: np.ndarray
    row_ids: np.ndarray  # [pairs] as in the file
    col_ids: np.ndarray


def read_entries(
    path: Path,
    columns: str | Sequence[str] | None = None,
    *,
    delimiter: str | None = None,
    decimal: str | None = None,
) -> Table:
    """Return the entries of a file: a row id, a column id and a value each.

    Texts with any usual delimiter, .npz and .npy (a column an array, rows of three
    numbers, a matrix with NaN where unobserved), scipy's sparse matrices, parquet; any
    of them in gzip, bzip2, xz or zip. What a file is, its content says. Ids are whole
    numbers or text.

    Args:
      path: of the file.
      columns: row, column and value: names, or numbers from 1, as a sequence or with
        commas between; None: well-known names, else the first three.
      delimiter: of a text, "tab" and "space" in words; None: found out.
      decimal: "." or "," in a text's values; None: found out.

    Raises:
      ConfigError, DataError: one line with the file, the line and the rule.
    """
    if decimal not in (None, ".", ","):
        raise ConfigError(f"decimal is {decimal!r}; it is '.' or ','")
    found = _open(path, delimiter)
    if isinstance(found, Table) and columns is None:
        return found
    if isinstance(found, Table):
        raise DataError(f"{path} holds a matrix, which has no columns to choose from")
    places = pick_columns(path, found, columns, 3)
    names = tuple(found.names[place] for place in places)
    with _one_line(path, path.suffix):
        arrays = found.read(places)
    _check_lengths(path, names, arrays)
    row_ids, rows = distinct_ids(path, found, names[0], arrays[0])
    col_ids, cols = distinct_ids(path, found, names[1], arrays[1])
    values, notes = finite_values(path, found, names[2], arrays[2], decimal)
    return Table(rows, cols, values, row_ids, col_ids, names, (*found.notes, *notes))


def read_pairs(
    path: Path,
    row_ids: np.ndarray,
    col_ids: np.ndarray,
    names: Sequence[str] = (),
    columns: str | Sequence[str] | None = None,
    *,
    delimiter: str | None = None,
) -> Pairs:
    """Return the (row id, column id) pairs of a file, in its order.

    Args:
      path: a file of any kind that `read_entries` takes; a value isn't needed.
      row_ids: of the fit.
      col_ids: of the fit.
      names: of the fit's columns, which are looked for first.
      columns: as in `read_entries`; the first two are used.
      delimiter: as in `read_entries`.

    Raises:
      ConfigError, DataError: one line with the file, the line and the rule.
    """
    found = _open(path, delimiter)
    if isinstance(found, Table):
        raise DataError(f"{path} holds a matrix; give a row id and a column id a line")
    if columns is None and len(names) > 1 and {*names[:2]} <= {*found.names}:
        columns = names[:2]
    places = pick_columns(path, found, columns, 2)
    taken = [found.names[place] for place in places]
    with _one_line(path, path.suffix):
        arrays = found.read(places)
    _check_lengths(path, taken, arrays)
    rows, cols = (
        distinct_ids(path, found, name, array)
        for name, array in zip(taken, arrays, strict=True)
    )
    row_places = _places(rows[0], row_ids)[rows[1]]
    col_places = _places(cols[0], col_ids)[cols[1]]
    return Pairs(row_places, col_places, rows[0][rows[1]], cols[0][cols[1]])


def _places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the place of each id among the known ones; -1 where it isn't there."""
    found = pc.index_in(_texts(ids), value_set=_texts(known))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _texts(ids: np.ndarray) -> pa.Array:
    array = pa.array(ids.tolist() if ids.dtype.kind in "OTUS" else ids)
    return array.cast(pa.large_string())


# Bytes, unpacked.


def _open(path: Path, delimiter: str | None) -> Columns | Table:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file of entries")
    if not path.exists():
        raise DataError(f"{path} doesn't exist; give a file of entries")
    data, ending, notes = path.read_bytes(), path.suffix.lower(), ()
    with _one_line(path, ending):
        while unpacked := _unpack(path, data):
            data, ending, more = unpacked
            notes = (*notes, *more)
        found = open_binary(path, data)
    if found is not None and delimiter is not None:
        raise DataError(
            f"{path} is no text, so delimiter {delimiter!r} separates nothing in it; "
            "leave the delimiter out"
        )
    if found is None and ending in BINARY:
        raise DataError(f"{path} can't be read as {ending}: it holds something else")
    if isinstance(found, Matrix):
        return _from_matrix(path, found._replace(notes=(*notes, *found.notes)))
    found = found or read_delimited(path, data, are_names, delimiter)
    return dataclasses.replace(found, notes=(*notes, *found.notes))


@contextmanager
def _one_line(path: Path, ending: str) -> Iterator[None]:
    """Turn what a reader raises for a damaged file into a DataError."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, UoeError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} can't be read as {ending}: {text}") from None


def _from_matrix(path: Path, matrix: Matrix) -> Table:
    """Return a matrix's entries; its indices are the ids, also of empty rows."""
    if not matrix.rows.size:
        raise DataError(f"{path} has no entries; completion needs at least one")
    found = Columns([matrix.name], True, [], lambda _: [], entry_name)
    array = to_arrow(path, matrix.name, matrix.values)
    values, _ = finite_values(path, found, matrix.name, array, None)
    ids, index = [], [matrix.rows.astype(np.int64), matrix.cols.astype(np.int64)]
    for axis, size in enumerate(matrix.shape):
        if size <= max(FREE_SIZE, 1000 * len(values)):
            ids.append(np.arange(int(size)))
        else:  # a factor of every row would fill the memory with zeros
            known, index[axis] = np.unique(index[axis], return_inverse=True)
            ids.append(known)
    names, notes = (matrix.name,), matrix.notes
    return Table(index[0], index[1], values, ids[0], ids[1], names, notes)


def _unpack(path: Path, data: bytes) -> tuple[bytes, str, tuple[str, ...]] | None:
    """Return what a packed file holds, its ending, and notes; None: isn't packed."""
    for magic, opener in PACKERS.items():
        if data.startswith(magic):
            # Of ratings.npz.gz the content has to be what .npz says.
            inside = path.stem if path.suffix.lower() in BINARY else ""
            with opener(io.BytesIO(data)) as file:
                return _read_limited(path, file), Path(inside).suffix.lower(), ()
    if not data.startswith(b"PK"):
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        names = [i.filename for i in packed.infolist() if not i.is_dir()]
        names = [n for n in names if not re.search(r"(^|/)(\.|__MACOSX/)", n)]
        if names and all(name.endswith(".npy") for name in names):
            return None
        if "[Content_Types].xml" in names:
            raise DataError(f"{path} is a spreadsheet; save it as .csv")
        likely = [n for n in names if re.search(r"(^|/)(ratings\.\w+|u\.data)$", n)]
        chosen = names if len(names) == 1 else likely
        if len(chosen) != 1:
            raise DataError(
                f"{path} holds {len(names)} files ({', '.join(names[:5])}); unpack it "
                "and give one"
            )
        with packed.open(chosen[0]) as file:
            content = _read_limited(path, file)
    notes = (f"{chosen[0]} of {len(names)} files",) if len(names) > 1 else ()
    return content, Path(chosen[0]).suffix.lower(), notes


def _read_limited(path: Path, file: Any) -> bytes:
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(
            f"{path} unpacks to more than {limit >> 30} GiB, half of this machine's "
            "memory; give a part of it"
        )
    return content


def _check_lengths(path: Path, names: Sequence[str], arrays: Sequence[Any]) -> None:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise DataError(
            f"{path}: columns {list(names)} have lengths {lengths}; make them one"
        )
    if not lengths[0]:
        raise DataError(f"{path} has no entries; completion needs at least one")
