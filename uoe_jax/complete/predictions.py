"""Predictions by a user's own ids, written as a table."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uoe_jax.data.entries import Pairs
from uoe_jax.errors import DataError
from uoe_jax.files import write_atomically
from uoe_jax.linalg.completion.factors import (
    Factors,
    load_factors,
    predict_known,
    save_factors,
)


class Completion(NamedTuple):
    """Factors and the ids of their rows and columns: integers or strings."""

    factors: Factors
    row_ids: np.ndarray
    col_ids: np.ndarray
    names: tuple[str, ...]  # of the file's columns


def save_completion(completion: Completion, path: Path) -> None:
    """Write factors, ids and names into one safetensors file."""
    factors, row_ids, col_ids, names = completion
    texts = np.array(names, np.dtypes.StringDType())
    save_factors(factors, path, row_ids=row_ids, col_ids=col_ids, names=texts)


def load_completion(place: Path) -> Completion:
    """Read what `save_completion` wrote, from its file or the folder around it.

    Raises:
      DataError: not a completion, or one without ids.
    """
    path = place / "factors.safetensors" if place.is_dir() else place
    if not path.is_file():
        raise DataError(
            f"{place} has no factors.safetensors; give a file of entries, or a folder "
            "that uoe complete wrote"
        )
    factors = load_factors(path)
    none = np.zeros(0, np.int64)
    ids = [factors.info.get(name, none) for name in ("row_ids", "col_ids")]
    if any(len(a) != n for a, n in zip(ids, factors.shape, strict=True)):
        raise DataError(f"{path} doesn't hold the ids of its rows and columns")
    names = factors.info.get("names", np.array(["row", "column", "value"]))
    return Completion(factors, ids[0], ids[1], tuple(names.tolist()))


def write_predictions(completion: Completion, pairs: Pairs, path: Path) -> int:
    """Write a CSV with a line for each pair, in their order; return how many are new.

    The header is the names of the row and the column in the fitted file (`row,column`
    of a matrix) and `prediction`. Ids are as in the file of pairs. A row or column that
    the fit never saw is predicted from the offset and the other's bias.
    """
    values = predict_known(completion.factors, pairs.rows, pairs.cols)
    names = completion.names[:2] if len(completion.names) > 2 else ("row", "column")
    if names == ("1", "2"):  # the file had no header
        names = ("row", "column")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "prediction"])
    shown = map(str, values)  # the shortest digits that mean the same number
    ids = (pairs.row_ids.tolist(), pairs.col_ids.tolist())
    writer.writerows(zip(*ids, shown, strict=True))
    write_atomically(path, text.getvalue())
    return int(((pairs.rows < 0) | (pairs.cols < 0)).sum())
