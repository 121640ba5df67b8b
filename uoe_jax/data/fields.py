"""Ids and values out of a column; a mistake is named by its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.data.columns import Columns
from uoe_jax.errors import DataError, extra_packages

with extra_packages():
    import pyarrow as pa
    import pyarrow.compute

pc: Any = pyarrow.compute  # whose functions are made at run time

MISSING = ["", "nan", "na", "n/a", "#n/a", "null", "none", "\\n", "?"]  # lower case
# A number in groups of three digits: 1.234,5, 1,234.5, 1 234,5, 1'234.5.
GROUPED = re.compile(r"[+-]?\d{1,3}([.,' \u00a0\u202f\u2019])\d{3}(\1\d{3})*([.,]\d*)?")
NUMBER = r"^[+-]?((\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?|inf|infinity)$"


def distinct_ids(
    path: Path, found: Columns, name: str, array: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids, ascending, and each entry's place among them."""
    kind = array.type
    if array.null_count:
        row = int(np.argmax(pc.is_null(array).to_numpy(zero_copy_only=False)))
        raise _missing_id(path, found, name, row)
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    if pa.types.is_decimal(kind):
        array = array.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        array = _decoded(path, name, array)
    if pa.types.is_integer(array.type):
        return np.unique(array.to_numpy(), return_inverse=True)
    if pa.types.is_floating(kind):
        ids, index = np.unique(array.to_numpy(), return_inverse=True)
        # Beyond 2^53 a float no longer tells neighbouring integers apart.
        whole = (np.floor(ids) == ids) & (np.abs(ids) < 2**53)
        if not whole.all():
            bad = int(np.argmin(whole))
            row = int(np.argmax(index == bad))
            raise _bad_id(path, found, name, row, str(ids[bad]))
        return ids.astype(np.int64), index
    if not pa.types.is_dictionary(kind):
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            raise DataError(
                f"{path}: column {name!r} holds {kind}; ids are whole numbers or text"
            )
        array = array.dictionary_encode()
    distinct, index = array.dictionary, array.indices.to_numpy()
    if not (
        pa.types.is_string(distinct.type) or pa.types.is_large_string(distinct.type)
    ):
        ids, place = distinct_ids(path, found, name, distinct)
        return _seen(ids, place[index])
    ids, place = _text_ids(path, found, name, distinct, index)
    return _seen(ids, place[index])


def _decoded(path: Path, name: str, array: pa.Array) -> pa.Array:
    """Return bytes as the text they spell in UTF-8."""
    try:
        return array.cast(pa.large_string())
    except pa.ArrowInvalid:
        raise DataError(
            f"{path}: column {name!r} holds bytes that aren't UTF-8 text; give ids as "
            "whole numbers or text"
        ) from None


def _seen(ids: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that occur (a category may have no entry) and the places."""
    present = np.bincount(index, minlength=len(ids)) > 0
    if present.all():
        return ids, index
    return ids[present], (np.cumsum(present) - 1)[index]


def _text_ids(
    path: Path, found: Columns, name: str, texts: pa.Array, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids of distinct texts, ascending, and the place of each text.

    Texts that all are whole numbers as a computer writes them become numbers; 007
    stays a text, or it would be 7, and so does 12E4, or it would be 120E3.
    """
    plain = pc.utf8_trim_whitespace(texts)
    for kind in (pa.int64(), pa.uint64()):
        try:
            numbers = plain.cast(kind)
        except pa.ArrowInvalid:
            continue
        if numbers.cast(plain.type).equals(plain):
            return np.unique(numbers.to_numpy(), return_inverse=True)
    numeric = pc.match_substring_regex(plain, NUMBER, ignore_case=True)
    missing = pc.is_in(pc.utf8_lower(plain), value_set=pa.array(MISSING, plain.type))
    numbers_only = pc.all(pc.or_(numeric, missing)).as_py()
    absent = missing if numbers_only else pc.equal(plain, "")
    if pc.any(absent).as_py():
        place = absent.index(True).as_py()
        raise _missing_id(path, found, name, int(np.argmax(index == place)))
    codes = pc.match_substring_regex(plain, r"^[+-]?(0\d+|\d{19,}|\d+[eE]\d+)$")
    if numbers_only and not pc.any(codes).as_py():
        words = plain.to_pylist()
        ids = np.array([float(word.replace(",", ".")) for word in words])
        whole = (np.floor(ids) == ids) & (np.abs(ids) < 2**53)
        if not whole.all():
            bad = int(np.argmin(whole))
            row = int(np.argmax(index == bad))
            raise _bad_id(path, found, name, row, words[bad])
        return np.unique(ids.astype(np.int64), return_inverse=True)
    ascending = plain.take(pc.sort_indices(plain)).unique()
    place = pc.index_in(plain, value_set=ascending).to_numpy()
    strings = np.array(ascending.to_pylist(), dtype=np.dtypes.StringDType())
    return strings, place.astype(np.int64)


def _missing_id(path: Path, found: Columns, name: str, row: int) -> DataError:
    return DataError(
        f"{path} {found.where(row)}: {name!r} is missing; every entry needs a row and "
        "a column"
    )


def _bad_id(path: Path, found: Columns, name: str, row: int, held: str) -> DataError:
    return DataError(
        f"{path} {found.where(row)}: column {name!r} holds {held}; ids must be "
        "integers or text (--columns says which are row, column and value)"
    )


def finite_values(
    path: Path, found: Columns, name: str, array: pa.Array, decimal: str | None
) -> tuple[np.ndarray, list[str]]:
    """Return finite values, and what was assumed about them."""
    notes: list[str] = []
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.dictionary_encode()
    kind, words, index = array.type, None, np.zeros(0, np.int64)
    if pa.types.is_dictionary(kind):
        words = array.dictionary.cast(pa.string())
        index = pc.fill_null(array.indices, len(words)).to_numpy()
        distinct, decimal = _numbers(path, found, name, words, index, decimal)
        values = np.append(distinct, np.nan)[index]
        notes = ["decimal commas"] if decimal == "," else []
    elif pa.types.is_null(kind):
        values = np.full(len(array), np.nan)
    elif (pa.types.is_primitive(kind) and not pa.types.is_temporal(kind)) or (
        pa.types.is_decimal(kind)
    ):
        array = array.cast(pa.uint8()) if pa.types.is_boolean(kind) else array
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    else:
        raise DataError(f"{path}: column {name!r} holds {kind}; it must be numbers")
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(np.argmin(finite))
        word = "" if words is None else [*words.to_pylist(), ""][index[bad]]
        empty = words is not None and not word.strip()
        raise DataError(
            f"{path} {found.where(bad)}: {name!r} of entry {bad + 1} is "
            f"{'missing' if empty else values[bad]} ({int((~finite).sum())} such); "
            "drop entries that aren't finite: what is unknown is left out"
        )
    return values, notes


def _numbers(
    path: Path,
    found: Columns,
    name: str,
    texts: pa.Array,
    index: np.ndarray,
    decimal: str | None,
) -> tuple[np.ndarray, str]:
    """Return the numbers that texts are, NaN where missing; and the decimal mark."""
    if decimal != ",":
        try:
            return texts.cast(pa.float64()).to_numpy(), "."
        except pa.ArrowInvalid:
            pass
    words = [word.strip() for word in texts.to_pylist()]
    if decimal is None:
        commas = [word for word in words if "," in word]
        decimal = "," if commas and not any("." in word for word in words) else "."
        groups = [re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", word) for word in commas]
        if decimal == "," and all(groups):
            raise DataError(
                f"{path}: column {name!r} holds {commas[0]}, a fraction or thousands; "
                "say --decimal , or write it without the comma"
            )
    numbers, other = np.full(len(words), np.nan), "," if decimal == "." else "."
    for place, word in enumerate(words):
        if re.match(NUMBER, word, re.IGNORECASE) and other not in word:
            numbers[place] = float(word.replace(",", "."))
        elif word.lower() not in MISSING:
            row = int(np.argmax(index == place))
            if GROUPED.fullmatch(word):
                raise DataError(
                    f"{path} {found.where(row)}: column {name!r} holds {word!r}, whose "
                    "thousands are marked; write numbers with one mark, the decimal"
                )
            raise DataError(
                f"{path} {found.where(row)}: column {name!r} holds {word!r}; it must "
                "be numbers"
            )
    return numbers, decimal
