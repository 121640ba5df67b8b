"""Folders of prepared arrays: written aside, checked by hash, renamed into place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.data.files import SourceFile, fingerprint, sha256_file, stamp
from uoe_jax.errors import DataError
from uoe_jax.files import format_json, read_json, write_atomically

MANIFEST = "manifest.json"
STAMPS = "stamps.json"  # file times, which differ from machine to machine
_BUILDING, _BUILDER = ".building-", "builder"
_ABANDONED_SECONDS = 24 * 3600.0
_HEADER_BYTES = 128
# A manifest's hash is over content, not where it lies.
_UNHASHED = ("hash", "path", "source")


class ArrayWriter:
    """Writes a .npy file of one dimension whose length isn't known beforehand."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, self.length = dtype, 0
        self._file = open(path, "wb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: np.ndarray) -> None:
        """Write values [N] after those before."""
        self._file.write(values.astype(self.dtype, copy=False).data)
        self.length += len(values)

    def close(self) -> None:
        """Write the header (format 1.0, padded to a fixed size) and close."""
        fields = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        text = repr(fields).ljust(_HEADER_BYTES - 11) + "\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)))
        self._file.write(text.encode("latin1"))
        self._file.close()


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    for kind in (np.uint8, np.uint16):
        if vocab_size <= np.iinfo(kind).max + 1:
            return np.dtype(kind)
    return np.dtype(np.uint32)


def load_array(path: Path) -> np.ndarray:
    """Return a prepared array, memory-mapped and read-only."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array can't be mapped
        return np.load(path, allow_pickle=False)


@contextmanager
def build_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` once everything is written.

    Nothing half-done is ever seen under the final name. If another process was faster,
    its folder stays, unless `replace`; maps of a replaced folder stay valid.
    """
    building, held = None, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=target.parent))
        # Locked before it has its name: whoever finds it unlocked deletes the folder.
        unnamed = building / f"{_BUILDER}.new"
        held = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(building / _BUILDER)
        content = building / "content"
        content.mkdir()
        yield content
        if replace and target.exists():
            target.rename(building / "replaced")
        with suppress(FileExistsError):
            _rename(content, target)
    except OSError as error:
        raise DataError(
            f"prepared data can't be written to {target.parent} ({error.strerror}); "
            "make room or set data.cache_dir"
        ) from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if held is not None:
            os.close(held)


def remove_abandoned(folder: Path) -> None:
    """Delete the unfinished folders that killed processes left in a cache folder."""
    for path in folder.glob(f"{_BUILDING}*"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(building: Path) -> bool:
    """Whether no process builds a folder any more: one locks a file as long as it does.

    Where that can't be known, a day without a change tells.
    """
    try:
        file = os.open(building / _BUILDER, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(file)
    except BlockingIOError:
        return False
    except OSError:  # it has just begun, or its file system has no locks
        with suppress(OSError):
            return time.time() - building.stat().st_mtime > _ABANDONED_SECONDS
        return False


def _rename(content: Path, target: Path) -> None:
    """Rename a folder; raise FileExistsError if the name is taken."""
    try:
        content.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, error.strerror) from None
        raise


def write_manifest(
    folder: Path, manifest: dict[str, Any], files: Sequence[SourceFile]
) -> dict[str, Any]:
    """Add the hashes of sources and of every file in `folder`; write and return it."""
    outputs = sorted(p for p in folder.iterdir())
    manifest = {
        **manifest,
        "sources": fingerprint(files),
        "outputs": {
            p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in outputs
        },
    }
    manifest["hash"] = hash_manifest(manifest)
    write_atomically(folder / MANIFEST, format_json(manifest, indent=2) + "\n")
    write_stamps(folder, manifest, files)
    return manifest


def write_stamps(
    folder: Path, manifest: dict[str, Any], files: Sequence[SourceFile]
) -> None:
    """Write the times of files that are what a manifest says: they need no hashing."""
    stamps = {
        "sources": {f.name: stamp(f.path) for f in files},
        "outputs": {name: stamp(folder / name) for name in manifest["outputs"]},
    }
    write_atomically(folder / STAMPS, format_json(stamps) + "\n")


def hash_manifest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says about content, as 64 hex digits."""
    content = {k: v for k, v in manifest.items() if k not in _UNHASHED}
    if "format" in content:
        content["format"] = 1  # whose hashes runs have recorded, of the same arrays
    return hashlib.sha256(format_json(content, sort_keys=True).encode()).hexdigest()


def hash_outputs(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what the prepared files hold, as 64 hex digits."""
    content = {name: entry["sha256"] for name, entry in manifest["outputs"].items()}
    return hashlib.sha256(format_json(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest; None if it is absent or damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
        return manifest if manifest["hash"] == hash_manifest(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_change(
    folder: Path, manifest: dict[str, Any], files: Sequence[SourceFile]
) -> str | None:
    """Return what differs between the sources now and then; None if nothing does."""
    recorded = {entry["name"]: entry for entry in manifest["sources"]}
    present = {file.name for file in files}
    for name in sorted(recorded.keys() ^ present):
        return f"{name} is {'gone' if name in recorded else 'new'}"
    stamps = _read_stamps(folder, "sources")
    for file in files:
        # An equal stamp means an untouched file, which needs no reading.
        if stamps.get(file.name) == stamp(file.path):
            continue
        if sha256_file(file.path) != recorded[file.name]["sha256"]:
            return f"{file.name} is not the file it was"
    return None


def find_damage(
    folder: Path, manifest: dict[str, Any], *, thorough: bool = False
) -> str | None:
    """Return the first prepared file that isn't what the manifest says, else None.

    Args:
      folder: the prepared data.
      manifest: its manifest.
      thorough: hash every file, also those whose size and times haven't changed.
    """
    stamps = _read_stamps(folder, "outputs")
    for name, entry in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if thorough or stamps.get(name) != stamp(path):
            if sha256_file(path) != entry["sha256"]:
                return f"{name} has other content than its SHA-256 says"
    return None


def _read_stamps(folder: Path, part: str) -> dict[str, list[int]]:
    try:
        return dict(read_json(folder / STAMPS)[part])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
