"""Source files: finding them, opening them, telling whether they changed."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

from uoe_jax.errors import DataError, nearest

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".lzma": lzma.open}
# First bytes of packed files, which may have lost their ending.
_PACKED = ((b"\x1f\x8b\x08", ".gz"), (b"\xfd7zXZ\x00", ".xz"), (b"BZh", ".bz2"))
_BZ2_BLOCK = b"1AY&SY"
_SPLIT_WORD = re.compile(r"(?:^|[._-])(train|valid|validation|val|dev|test)(?:[._-]|$)")
_LISTED = 20  # file names shown in a "known:" list


class SourceFile(NamedTuple):
    """A file and the name it goes by in manifests and messages."""

    name: str
    path: Path


def expand(path: str) -> list[SourceFile]:
    """Return the files a path, folder (searched to the bottom) or glob stands for.

    Hidden files and `__pycache__` are left out; the order is by name. Raises DataError
    if there is nothing.
    """
    if not path.strip():
        raise DataError("data.path is empty; name a file, a folder or a pattern")
    given = Path(path).expanduser()
    if given.is_dir():
        found = [
            SourceFile(p.relative_to(given).as_posix(), p)
            for p in given.rglob("*")
            if p.is_file() and not _is_hidden(p.relative_to(given))
        ]
        if not found:
            raise DataError(f"data.path {path} is an empty folder; put files into it")
        return sorted(found)
    if given.is_file():
        return [SourceFile(given.name, given)]
    if any(c in path for c in "*?["):
        matches = sorted(Path(p) for p in glob.glob(str(given), recursive=True))
        matches = [p for p in matches if p.is_file()]
        if not matches:
            raise DataError(f"data.path {path} matches no file; check the pattern")
        root = os.path.commonpath([p.parent for p in matches])
        return [SourceFile(p.relative_to(root).as_posix(), p) for p in matches]
    raise DataError(missing_file(given, "data.path"))


def missing_file(path: Path, option: str) -> str:
    """Return the message for a path that doesn't exist, with names like it."""
    if str(path).startswith("hf:"):
        return (
            f"{option} {path} isn't read here; save the data as .jsonl or .parquet "
            "and give the file, or name one of TFDS: tfds:NAME"
        )
    folder = path.parent
    if not folder.is_dir():
        return f"{option} {path} doesn't exist, nor does its folder; check the path"
    names = sorted(p.name for p in folder.iterdir() if not _is_hidden(Path(p.name)))
    if not names:
        return f"{option} {path} doesn't exist; its folder is empty"
    hint = nearest(path.name, names)
    if hint.startswith("known") and len(names) > _LISTED:
        hint = f"known: {', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"
    return f"{option} {path} doesn't exist; {hint}"


def _is_hidden(relative: Path) -> bool:
    return any(p.startswith(".") or p == "__pycache__" for p in relative.parts)


def is_packed(path: Path) -> bool:
    """Return whether a file is read through a decompressor."""
    return _packing(path) is not None


def _packing(path: Path) -> str | None:
    """Return how a file is packed, by its ending or its first bytes."""
    suffix = path.suffix.lower()
    if suffix in _OPENERS:
        return suffix
    if suffix == ".tgz":
        return ".gz"
    try:
        with open(path, "rb") as file:
            head = file.read(10)
    except OSError:
        return None
    for magic, packing in _PACKED:
        # "BZh" is a word; the archive goes on with its block size and pi.
        if head.startswith(magic) and (packing != ".bz2" or head[4:] == _BZ2_BLOCK):
            return packing
    return None


def content_suffix(path: Path) -> str:
    """Return the suffix that names the content: `.txt` of `a.TXT.xz`."""
    if path.suffix.lower() in _OPENERS:
        path = path.with_suffix("")
    return path.suffix.lower()


@contextmanager
def open_content(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed where it is packed.

    Raises DataError where the file can't be read or its archive is broken.
    """
    packing = _packing(path)
    try:
        with (_OPENERS[packing] if packing else open)(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} can't be read ({reason}); restore the file") from error


def named_splits(files: list[SourceFile]) -> dict[str, str]:
    """Return {name: split} if every file says its split and one says "train".

    `train.txt`, `wiki.valid.tokens` and `test-00000-of-00002.jsonl` say theirs.
    """
    splits = {}
    for file in files:
        found = _SPLIT_WORD.search(file.path.name.lower())
        if not found:
            return {}
        word = found[1]
        splits[file.name] = "valid" if word.startswith(("val", "dev")) else word
    return (
        splits if len(set(splits.values())) > 1 and "train" in splits.values() else {}
    )


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 as 64 hex digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})") from None


def stamp(path: Path) -> list[int]:
    """Return [bytes, mtime_ns, ctime_ns]: equal stamps mean an untouched file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def fingerprint(files: Iterable[SourceFile]) -> list[dict[str, object]]:
    """Return name, bytes and SHA-256 of every file."""
    return [
        {"name": f.name, "bytes": f.path.stat().st_size, "sha256": sha256_file(f.path)}
        for f in files
    ]
