"""Checksums of a checkpoint: of every file and of every array's bytes.

Orbax restores flipped bits without a word; a checkpoint here is complete only with
its `integrity.json`, and is restored only if everything in it still matches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.errors import CheckpointError
from uoe_jax.files import format_json, read_json, write_atomically

MANIFEST = "integrity.json"
_BLOCK = 1 << 22
_HEADER, _HEADER_BYTES = ".zarray", 1 << 16  # of an array, and the longest that is read


def digest_array(array: np.ndarray) -> str:
    """Return 32 hex digits of blake2b over an array's bytes in C order."""
    contiguous = np.ascontiguousarray(array)
    view = contiguous.reshape(-1).view(np.uint8)
    return hashlib.blake2b(view.data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Return 32 hex digits of blake2b over a file's bytes."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and digest of every array by name."""
    return {
        name: {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "blake2b": digest_array(array),
        }
        for name, array in arrays.items()
    }


def write_manifest(
    folder: Path,
    arrays: Mapping[str, dict[str, Any]],
    others: Mapping[str, dict[str, Any]] | None = None,
    **about: Any,
) -> None:
    """Write `integrity.json` of a finished folder, atomically and durably.

    `others` are files of it that lie elsewhere, as `describe_files` has them.
    """
    found = describe_files(folder) | dict(others or {})
    files = {name: found[name] for name in sorted(found)}
    content = {"format": 1, **about, "arrays": dict(arrays), "files": files}
    content["blake2b"] = _digest_content(content)
    write_atomically(folder / MANIFEST, format_json(content, indent=1))


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and digest of every file by name, the manifest left out."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": digest_file(path),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's `integrity.json`; raise CheckpointError if it is damaged."""
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged")
    if content.pop("blake2b", None) != _digest_content(content):
        raise CheckpointError(f"{path} is damaged")
    return content


def check_files(
    folder: Path, manifest: Mapping[str, Any], *, wanted: Container[str]
) -> list[str]:
    """Return one phrase per file that is missing or differs from the manifest.

    Files of arrays that aren't `wanted` stay unread.
    """
    return list(find_wrong(folder, manifest, wanted=wanted).values())


def find_wrong(
    folder: Path, manifest: Mapping[str, Any], *, wanted: Container[str]
) -> dict[str, str]:
    """Return what `check_files` does, by the names of the files."""
    problems: dict[str, str] = {}
    for name, stated in manifest["files"].items():
        path, array = folder / name, _array_of(name, manifest["arrays"])
        if array is not None and array not in wanted:
            continue
        if not path.is_file():
            problems[name] = f"{path} is missing"
        elif path.stat().st_size != stated["bytes"]:
            problems[name] = (
                f"{path} has {path.stat().st_size} bytes, not {stated['bytes']}"
            )
        elif digest_file(path) != stated["blake2b"]:
            problems[name] = f"{path} has changed bytes"
        else:
            continue
        if array is not None:
            problems[name] += f" (array {array})"
    return problems


def check_headers(folder: Path, shapes: Mapping[str, list[int]]) -> list[str]:
    """Return one phrase per array whose own header says another shape than expected.

    Memory is taken by what a header says, before any checksum of the array is.
    """
    problems = []
    for name, shape in shapes.items():
        path = folder / "state" / name / _HEADER
        try:
            header = read_json(path, max_bytes=_HEADER_BYTES)
            stated, chunks = list(header["shape"]), list(header["chunks"])
            fits = stated == shape and len(chunks) == len(shape)
            fits &= all(
                type(c) is int and 0 < c <= max(n, 1)
                for c, n in zip(chunks, shape, strict=False)
            )
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{path} is damaged (array {name})")
            continue
        if not fits:
            problems.append(
                f"{path} says shape {stated} in chunks of {chunks}, expected {shape} "
                f"(array {name})"
            )
    return problems


def check_arrays(
    arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> list[str]:
    """Return one phrase per restored array that isn't the one that was saved."""
    stated = manifest["arrays"]
    return [
        f"array {name} was restored with other bytes"
        for name, array in arrays.items()
        if name not in stated or digest_array(array) != stated[name]["blake2b"]
    ]


def _digest_content(content: Mapping[str, Any]) -> str:
    text = format_json(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _array_of(file_name: str, arrays: Mapping[str, Any]) -> str | None:
    """Return the array a file belongs to: its folder carries the array's name."""
    for part in file_name.split("/"):
        if part in arrays:
            return part
    return None
