"""Sources that are arrays already: images with labels, and token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import DataConfig
from uoe_jax.data.files import SourceFile
from uoe_jax.data.split import SPLITS, assign_splits, hash_fraction, range_cuts
from uoe_jax.errors import DataError

# Names of (inputs, labels) in .npz files, by split.
_PAIRS = {
    "train": (("xtr", "ytr"), ("x_train", "y_train"), ("train_x", "train_y")),
    "valid": (("xva", "yva"), ("x_valid", "y_valid"), ("valid_x", "valid_y")),
    "test": (("xte", "yte"), ("x_test", "y_test"), ("test_x", "test_y")),
}
_ALONE = (("x", "y"), ("images", "labels"), ("tokens", "labels"))


@dataclass(frozen=True)
class Ragged:
    """Rows of token ids of any lengths, end to end: row n is starts[n]:starts[n+1]."""

    tokens: np.ndarray
    starts: np.ndarray
    ndim = 2

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return self.tokens.size


Pairs = dict[str, tuple[Any, np.ndarray | None]]  # inputs: an array or Ragged


@dataclass(frozen=True)
class ArraySource:
    """Arrays of a few splits: `load` returns {split: (inputs, labels or None)}.

    Inputs are images [N, Hi, Wi, Ci], token rows [N, T] or `Ragged`, or one token
    stream [T]. Splits that are missing are taken from train.
    """

    name: str
    files: tuple[SourceFile, ...]
    config: DataConfig
    load: Callable[[], Pairs]

    def splits(self) -> Pairs:
        """Return every split's (inputs, labels); raise DataError if they don't fit."""
        given = self.load()
        for split, (inputs, labels) in given.items():
            if labels is not None and len(inputs) != len(labels):
                raise DataError(
                    f"{self.name} {split} has {len(inputs)} inputs and {len(labels)} "
                    "labels; they must be as many"
                )
            if not inputs.size:
                raise DataError(f"{self.name} {split} is empty; give it examples")
        return _fill_splits(given, self.config)


def _fill_splits(given: Pairs, config: DataConfig) -> Pairs:
    """Take the splits that aren't given from train: ranges of a stream, else rows."""
    if set(given) == set(SPLITS):
        return {split: given[split] for split in SPLITS}
    inputs, labels = given["train"]
    fraction = {
        "valid": 0.0 if "valid" in given else config.valid_fraction,
        "test": 0.0 if "test" in given else config.test_fraction,
    }
    if inputs.ndim == 1:
        cuts = range_cuts([len(inputs)], fraction["valid"], fraction["test"])
        own = dict(zip(SPLITS, np.split(inputs, cuts), strict=True))
        return {s: given[s] if s in given and s != "train" else (own[s], None)
                for s in SPLITS}  # fmt: skip
    rows = np.ascontiguousarray(inputs)
    keys = np.array([hash_fraction(row.tobytes()) for row in rows])
    free = np.full(len(rows), -1)
    assigned = assign_splits(free, keys, fraction["valid"], fraction["test"])
    result = {}
    for index, split in enumerate(SPLITS):
        chosen = assigned == index
        own_labels = None if labels is None else labels[chosen]
        result[split] = (rows[chosen], own_labels)
        if split in given and split != "train":
            result[split] = given[split]
    return result


def digits_source(config: DataConfig) -> ArraySource:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels, values 0 to 16."""
    return ArraySource("digits", (), config, _load_digits)


def _load_digits() -> Pairs:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
    return {"train": (images, np.asarray(labels, np.int32))}


def npz_source(files: tuple[SourceFile, ...], config: DataConfig) -> ArraySource:
    """Return the images or tokens of one .npz (or .npy) file."""
    if len(files) != 1:
        raise DataError(
            f"data.path {config.path} has {len(files)} array files; name one of them"
        )
    file = files[0]
    return ArraySource(file.name, files, config, lambda: _read_npz(file.path))


def _read_npz(path: Path) -> Pairs:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            named = {"tokens": loaded}
        else:
            with loaded:
                named = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{path} can't be read as arrays ({error})") from None
    except Exception as error:  # a damaged archive: zipfile.BadZipFile, zlib.error
        raise DataError(f"{path} is damaged ({error}); restore the file") from None
    pairs = _find_pairs(named)
    if "train" not in pairs:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in named.items())
        raise DataError(
            f"{path} holds {shapes or 'nothing'}; name the arrays xtr, ytr, xte, yte, "
            "or tokens, or train, valid, test"
        )
    return {
        split: (_with_channels(x, path), None if y is None else _labels(y, path))
        for split, (x, y) in pairs.items()
    }


def _find_pairs(named: dict[str, np.ndarray]) -> Pairs:
    """Return the arrays by split, from the names that are usual."""
    found: Pairs = {}
    for split, names in _PAIRS.items():
        alone = ((split, f"{split}_labels"),) + (_ALONE if split == "train" else ())
        for x, y in names + alone:
            if x in named and split not in found:
                found[split] = (named[x], named.get(y))
    return found


def _with_channels(array: np.ndarray, path: Path) -> np.ndarray:
    """Return images as [N, Hi, Wi, Ci]; leave integer streams and rows alone."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim in (1, 2) and array.dtype.kind in "iu" and array.size:
        if array.min() < 0:
            raise DataError(f"{path} has token id {array.min()}; ids start at 0")
        return array
    if array.ndim == 4 and array.dtype.kind in "iufb":
        if array.dtype == np.uint8:
            return array
        if not np.isfinite(array).all():
            raise DataError(f"{path} has pixels that aren't finite; mend the array")
        return array.astype(np.float32)
    if not array.size:
        return array
    raise DataError(
        f"{path} has an array {array.dtype} {list(array.shape)}; images are "
        "[N, height, width(, channels)], tokens are integers [T] or [N, T]"
    )


def _labels(labels: np.ndarray, path: Path) -> np.ndarray:
    """Return class numbers [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise DataError(
            f"{path} has labels {labels.dtype} {list(labels.shape)}; they must be "
            "class numbers [N] from 0"
        )
    return labels.astype(np.int32)
