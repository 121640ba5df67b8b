"""Observed entries of a matrix (row id, column id, value) from files of many kinds.

In four steps, top to bottom: a file's bytes, unpacked; the columns in them; the three
columns that are meant; ids and values, where a mistake is named by its line.
"""

from __future__ import annotations

import bz2
import csv
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
from uoe_jax.data.delimited import is_number, read_delimited
from uoe_jax.data.fields import distinct_ids, finite_values
from uoe_jax.errors import ConfigError, DataError, UoeError, extra_packages, nearest

with extra_packages():
    import pyarrow as pa
    import pyarrow.compute

pc: Any = pyarrow.compute  # whose functions are made at run time

# Names by which columns are known: without case, signs, a last s and what follows a
# colon.
KNOWN = (
    "row user userid uid u customer customerid custid client clientid member memberid "
    "reviewer reviewerid account accountid visitor visitorid person personid",
    "col column item itemid iid i movie movieid film filmid book bookid isbn product "
    "productid asin parentasin busines businessid song songid track trackid artist "
    "artistid game gameid anime animeid recipe recipeid joke jokeid course courseid "
    "restaurant restaurantid",
    "value val rating rate score r data overall bookrating y",
)
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
    places = _pick(path, found, columns, 3)
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
    places = _pick(path, found, columns, 2)
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
    if found is None and ending in BINARY:
        raise DataError(f"{path} can't be read as {ending}: it holds something else")
    if isinstance(found, Matrix):
        return _from_matrix(path, found)
    found = found or read_delimited(path, data, _are_names, delimiter)
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
    return Table(index[0], index[1], values, ids[0], ids[1], (matrix.name,))


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


# The columns that are meant.


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|s$", "", name.split(":")[0].strip().lower())


def _known(names: Sequence[str], role: int) -> int | None:
    """Return the position of the best-known name of a role, 0 to 2."""
    plain = [_plain(name) for name in names]
    return next((plain.index(n) for n in KNOWN[role].split() if n in plain), None)


def _are_names(names: list[str]) -> bool:
    return None not in [_known(names, role) for role in range(3)]


def _pick(
    path: Path, found: Columns, asked: str | Sequence[str] | None, need: int
) -> list[int]:
    """Return the positions of row, column and, of three, value."""
    names, width = found.names, len(found.names)
    if asked is not None:
        return _asked(path, found, asked, need)
    roles = "a row, a column and a value" if need == 3 else "a row and a column"
    if width == 1 and found.sample:  # a text that no delimiter splits
        raise DataError(
            f"{path} has one column, {names[0]!r}; it needs {roles}: say what stands "
            "between them with --delimiter"
        )
    if width < need:
        raise DataError(
            f"{path} has {'columns' if found.named else 'only columns'} {names}; it "
            f"needs {roles}"
            + (
                ": events without a value (implicit feedback) aren't supported"
                * (need == 3)
            )
        )
    choose = DataError(
        f"{path} has columns {names}; say which are {roles.replace('a ', '')}: "
        + ("--columns user,item,rating, by name or by number from 1")
    )
    if not found.named:
        columns = [list(column) for column in zip(*found.sample, strict=False)]
        if need == 3 and width > 3 and columns and not _is_rating(columns):
            raise choose
        return list(range(need))
    known = [_known(names, role) for role in range(need)]
    rest = [place for place in range(width) if place not in known]
    in_place = all(place in (None, role) for role, place in enumerate(known))
    # Three are taken in order; of more, a guess would take a time for a value. Where
    # the value is known, which of the others is called a row makes no difference.
    sure = known[-1] is not None or known.count(None) == 1 or in_place
    if None in known and (width > need and not (need == 2 and in_place) or not sure):
        raise choose
    chosen = [rest.pop(0) if place is None else place for place in known]
    for place in chosen:
        _check_single(path, names, names[place])
    return chosen


def _check_single(path: Path, names: Sequence[str], name: str) -> None:
    """Raise DataError for a name that several columns have."""
    plain = name.strip().lower()
    places = [i for i, other in enumerate(names, 1) if other.strip().lower() == plain]
    if len(places) > 1:
        raise DataError(
            f"{path} has {len(places)} columns called {name!r}, "
            f"{' and '.join(map(str, places))}; say which are row, column and value by "
            "number: --columns 1,2,3"
        )


def _is_rating(columns: list[list[str]]) -> bool:
    """Whether the third of more columns without names is likely the value.

    It is if it holds numbers and none of the three are times, unless a later one has
    fractions and it has none.
    """
    first, second, third, *later = columns
    if _are_times(first) or _are_times(second) or not _are_small(third):
        return False
    fractions = [_are_small(c) and _have_fractions(c) for c in later]
    return _have_fractions(third) or not any(fractions)


def _are_times(fields: list[str]) -> bool:
    """Whether fields are dates, or seconds since 1970 of the years 1989 to 2039."""
    date = re.compile(r"\s*(\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4})")
    seconds = re.compile(r"\s*([6-9]|1\d|2[01])\d{8}(\.\d*)?\s*$")
    return any(all(map(kind.match, fields)) for kind in (date, seconds))


def _are_small(fields: list[str]) -> bool:
    filled = [field for field in fields if field.strip()]
    return all(map(is_number, filled)) and not all(
        float(field.replace(",", ".")) > 1e8 for field in filled
    )


def _have_fractions(fields: list[str]) -> bool:
    return any(float(f.replace(",", ".")) % 1 for f in fields if f.strip())


def _asked(
    path: Path, found: Columns, asked: str | Sequence[str], need: int
) -> list[int]:
    listed = next(csv.reader([asked]), []) if isinstance(asked, str) else list(asked)
    wanted = [str(name).strip() for name in listed]
    if len(wanted) not in (3, need):
        raise ConfigError(
            f"columns is {','.join(wanted)!r}; give three, row, column and value: "
            "--columns user,item,rating"
        )
    places, width = [], len(found.names)
    for name in wanted[:need]:
        if name in found.names:
            _check_single(path, found.names, name)
            places.append(found.names.index(name))
        elif name.isdecimal() and 1 <= int(name) <= width:
            places.append(int(name) - 1)
        elif name.lstrip("-").isdecimal():
            raise DataError(
                f"{path} has no column {name}; columns are counted from 1 to {width}"
            )
        else:
            raise DataError(
                f"{path} has no column {name!r}; {nearest(name, found.names)}"
            )
    if len(set(places)) < need:
        raise ConfigError(
            f"columns is {','.join(wanted)!r}, one of them twice; give different ones"
        )
    return places
