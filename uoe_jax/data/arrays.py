"""Sources that are arrays already: images with labels, and token ids."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from uoe_jax.config import DataConfig
from uoe_jax.data.files import SourceFile
from uoe_jax.data.split import SPLITS, assign_splits, hash_fraction, range_cuts
from uoe_jax.errors import DataError, extra_packages

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
    scored: np.ndarray | None = None  # 1: a token is trained on; None: all are
    ndim: ClassVar[int] = 2

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return self.tokens.size


MAX_CLASSES = 1 << 20  # every class up to the largest has a name in the manifest
_LARGEST_ID = np.iinfo(np.int32).max

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
    with extra_packages():
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
    """Return the arrays by split; those that aren't needed stay unread."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            pairs = {"train": (loaded, None)}
        else:
            with loaded:
                pairs = _read_pairs(loaded, path)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError) as error:
        raise DataError(f"{path} can't be read as arrays ({error})") from None
    except Exception as error:  # a damaged archive: zipfile.BadZipFile, zlib.error
        raise DataError(f"{path} is damaged ({error}); restore the file") from None
    return {
        split: (
            _with_channels(x, path),
            None if y is None else check_labels(y, str(path)),
        )
        for split, (x, y) in pairs.items()
    }


def _read_pairs(loaded: Any, path: Path) -> Pairs:
    """Return the arrays of an opened .npz that have usual names."""
    headers = _headers(loaded.zip, path)
    names = _find_pairs(headers)
    if "train" not in names:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in headers.items())
        raise DataError(
            f"{path} holds {shapes or 'nothing'}; name the arrays xtr, ytr, xte, yte, "
            "or tokens, or train, valid, test"
        )
    wanted = [name for pair in names.values() for name in pair if name]
    size, room = sum(headers[name].bytes for name in wanted), _memory()
    if size > room:
        raise DataError(
            f"{path} unpacks to {size / 1e9:,.1f} GB of {', '.join(wanted)}, more than "
            f"this machine's {room / 1e9:,.1f} GB; give fewer or smaller arrays"
        )
    return {
        split: (loaded[x], None if y is None else loaded[y])
        for split, (x, y) in names.items()
    }


class _Header(NamedTuple):
    """What an array in an archive says of itself."""

    shape: tuple[int, ...]
    bytes: int


def _headers(archive: zipfile.ZipFile, path: Path) -> dict[str, _Header]:
    """Return the header of every array, its data unread.

    Raises DataError for an array whose size isn't what the archive says.
    """
    found = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:  # no number has a type that needs a later version
                continue
            shape, _, dtype = read(file)
            size = math.prod(shape) * dtype.itemsize
            stored = info.file_size - file.tell()
        if size != stored and not dtype.hasobject:
            raise DataError(
                f"{path} array {name} says {list(shape)} {dtype}, {size:,} bytes, but "
                f"holds {stored:,}; restore the file"
            )
        found[name] = _Header(shape, size)
    return found


def _memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _find_pairs(
    named: Collection[str],
) -> dict[str, tuple[str, str | None]]:
    """Return the names of (inputs, labels) by split, of those that are usual."""
    found: dict[str, tuple[str, str | None]] = {}
    for split, names in _PAIRS.items():
        alone = ((split, f"{split}_labels"),) + (_ALONE if split == "train" else ())
        for x, y in names + alone:
            if x in named and split not in found:
                found[split] = (x, y if y in named else None)
    return found


def _with_channels(array: np.ndarray, path: Path) -> np.ndarray:
    """Return images as [N, Hi, Wi, Ci]; leave integer streams and rows alone."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim in (1, 2) and array.dtype.kind in "iu" and array.size:
        if array.min() < 0:
            raise DataError(f"{path} has token id {array.min()}; ids start at 0")
        if array.max() > _LARGEST_ID:
            raise DataError(
                f"{path} has token id {array.max()}; ids go up to {_LARGEST_ID:,}"
            )
        return array
    if array.ndim == 4 and array.dtype.kind in "iufb":
        if array.dtype == np.uint8:
            return array
        with np.errstate(over="ignore"):
            pixels = array.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise DataError(f"{path} has pixels that aren't finite; mend the array")
        return pixels
    if not array.size:
        return array
    raise DataError(
        f"{path} has an array {array.dtype} {list(array.shape)}; images are "
        "[N, height, width(, channels)], tokens are integers [T] or [N, T]"
    )


def check_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Return class numbers [N] as int32; raise DataError if they aren't any."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise DataError(
            f"{where} has labels {labels.dtype} {list(labels.shape)}; they must be "
            "class numbers [N] from 0"
        )
    check_class(int(labels.max(initial=0)), where)
    return labels.astype(np.int32)


def check_class(label: int, where: str) -> None:
    """Raise DataError for a class number that makes too long a list of classes."""
    if label >= MAX_CLASSES:
        raise DataError(
            f"{where} has label {label}; classes go up to {MAX_CLASSES - 1:,}, so "
            "number the classes from 0"
        )
