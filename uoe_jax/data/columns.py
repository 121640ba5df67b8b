"""Columns and matrices of binary files: .npz, .npy, parquet, scipy's, Matrix Market."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.errors import DataError, extra_packages

with extra_packages():
    import pyarrow as pa


@dataclass(frozen=True)
class Columns:
    """The columns of a file, whatever its format, before any is read."""

    names: list[str]  # "1", "2", ... where the file has none
    named: bool  # the names are the file's own
    sample: list[list[str]]  # a few rows of a text, to judge columns by
    read: Callable[[Sequence[int]], list[Any]]  # positions -> arrow arrays
    where: Callable[[int], str]  # row from 0 -> "line 9" or "entry 9"
    notes: tuple[str, ...] = ()  # what was assumed


class Matrix(NamedTuple):
    """A matrix's observed entries; its indices are their ids."""

    name: str
    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]
    notes: tuple[str, ...] = ()  # what was assumed


def open_binary(path: Path, data: bytes) -> Columns | Matrix | None:
    """Return the columns or the matrix in a file's bytes; None: isn't a binary file.

    Raises:
      DataError: one line that names the file and what it holds.
      ValueError, OSError, pyarrow.ArrowException: the file is damaged.
    """
    if data.startswith(b"PK"):
        return _open_npz(path, data)
    if data.startswith(b"\x93NUMPY"):
        return _open_array(path, "array", np.load(io.BytesIO(data), allow_pickle=False))
    if data.startswith(b"%%MatrixMarket"):
        with extra_packages():
            from scipy.io import mmread

        found = _open_sparse("matrix", mmread(io.BytesIO(data), spmatrix=False))
        # The file counts from 1; scipy and the factors from 0.
        return found._replace(notes=("row 1 of the file is id 0",))
    if data.startswith(b"PAR1"):
        return _open_parquet(data)
    return None


def entry_name(row: int) -> str:
    """Return what a row of a file without lines is called."""
    return f"entry {row + 1}"


def _open_parquet(data: bytes) -> Columns:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(pa.BufferReader(data))
    names = [n for n in file.schema_arrow.names if n != "__index_level_0__"]

    def read(places: Sequence[int]) -> list[pa.Array]:
        wanted = [names[place] for place in places]
        table = file.read(wanted).unify_dictionaries()
        columns = [table.column(name).combine_chunks() for name in wanted]
        return [c if isinstance(c, pa.Array) else c.chunk(0) for c in columns]

    return Columns(names, True, [], read, entry_name)


def _open_npz(path: Path, data: bytes) -> Columns | Matrix:
    file = np.load(io.BytesIO(data), allow_pickle=False)
    names = list(file.files)
    if {"format", "shape", "data"} <= {*names}:
        with extra_packages():
            import scipy.sparse

        return _open_sparse("sparse matrix", scipy.sparse.load_npz(io.BytesIO(data)))
    if len(names) == 1:
        return _open_array(path, names[0], file[names[0]])
    if {*names} == {"X", "y"}:  # an estimator's
        pairs = file["X"]
        if pairs.ndim == 2 and pairs.shape[1] == 2:
            columns = {"row": pairs[:, 0], "col": pairs[:, 1], "value": file["y"]}
            return _from_arrays(path, columns)
    return _from_arrays(path, file)


def _open_array(path: Path, name: str, array: np.ndarray) -> Columns | Matrix:
    if array.dtype.names:
        return _from_arrays(path, {field: array[field] for field in array.dtype.names})
    if array.ndim == 2 and array.dtype.kind in "US" and array.shape[1] > 2:
        return _from_arrays(path, {str(k + 1): c for k, c in enumerate(array.T)})
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{path} holds one array of shape {list(array.shape)} and type "
            f"{array.dtype}; give a matrix with NaN where unobserved, or rows, cols "
            "and values"
        )
    if _are_triplets(array):
        columns = {str(k + 1): column for k, column in enumerate(array.T)}
        return _from_arrays(path, columns, ("a row of the array is an entry",))
    rows, cols = np.nonzero(~np.isnan(array))
    return Matrix(name, rows, cols, array[rows, cols], array.shape)


def _are_triplets(array: np.ndarray) -> bool:
    """Whether rows of three or four finite numbers begin with two indices.

    As a matrix such an array would have nothing to fill in.
    """
    if array.shape[1] not in (3, 4) or len(array) <= array.shape[1]:
        return False
    ids = array[:, :2]
    whole = bool(np.isfinite(array).all() and (np.floor(ids) == ids).all())
    return whole and len(np.unique(ids, axis=0)) > len(array) // 2


def _open_sparse(name: str, matrix: Any) -> Matrix:
    if not hasattr(matrix, "tocoo"):  # a dense file of the Matrix Market
        rows, cols = np.nonzero(~np.isnan(matrix))
        return Matrix(name, rows, cols, matrix[rows, cols], matrix.shape)
    padded = matrix.format in ("dia", "bsr")  # zeros that only fill up the layout
    coo = matrix.tocoo()
    keep = coo.data != 0 if padded else slice(None)
    return Matrix(name, coo.row[keep], coo.col[keep], coo.data[keep], coo.shape)


def _from_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], notes: tuple[str, ...] = ()
) -> Columns:
    names = list(arrays)

    def read(places: Sequence[int]) -> list[pa.Array]:
        return [to_arrow(path, names[p], arrays[names[p]]) for p in places]

    named = names != [str(k + 1) for k in range(len(names))]
    return Columns(names, named, [], read, entry_name, notes)


def to_arrow(path: Path, name: str, array: np.ndarray) -> pa.Array:
    """Return one column of numbers or text; raise DataError for anything else."""
    if array.ndim != 1:
        raise DataError(
            f"{path}: {name!r} has shape {list(array.shape)}; give one number for each "
            "entry"
        )
    kind = array.dtype.kind
    if kind == "S":
        held = array.tolist()
        try:
            return pa.array([text.decode() for text in held], pa.string())
        except UnicodeDecodeError:
            return pa.array([text.decode("latin-1") for text in held], pa.string())
    if kind in "UT":
        return pa.array(array.tolist(), pa.string())
    if kind not in "biuf":  # complex, times, records
        raise DataError(
            f"{path}: column {name!r} holds {array.dtype}; it must be numbers"
        )
    wide = kind == "f" and array.dtype.itemsize > 8
    dtype = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
    return pa.array(np.ascontiguousarray(array, dtype))
