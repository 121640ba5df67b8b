"""Arrays kept beside a run's weights: safetensors files that say what they are of.

Second moments and their factors are stored as their lower triangles, row after row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uoe_jax.errors import DataError
from uoe_jax.files import format_json, parse_json
from uoe_jax.runs.integrity import describe_arrays, digest_array

_ABOUT, _CHECKSUM = "about", "blake2b"


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return 32 hex digits that tell arrays apart, names and dtypes included."""
    described = describe_arrays(arrays)
    return digest_described(described)


def digest_described(described: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what `digest_arrays` does, of arrays whose digests are known by name."""
    lines = [
        f"{name} {array['dtype']} {tuple(array['shape'])} {array['blake2b']}"
        for name, array in sorted(described.items())
    ]
    return digest_array(np.frombuffer("\n".join(lines).encode(), np.uint8))


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write arrays and what they are of; a reader sees the whole file or the old one.

    Raises OSError if it can't be written.
    """
    content = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    described = {
        _ABOUT: format_json(dict(about)),
        _CHECKSUM: digest_arrays(content),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(content, temporary, metadata=described)
        temporary.chmod(0o644)  # it is made for its owner alone
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(" ".join(str(error).split())) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_about(path: Path) -> dict[str, Any]:
    """Return what a file says of its arrays; raise DataError for another's file."""
    try:
        with safe_open(path, "numpy") as file:
            about = parse_json((file.metadata() or {})[_ABOUT], f"the header of {path}")
        return dict(about)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        raise DataError(f"{path} is damaged, or another program's") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return a file's arrays by name; raise DataError if their bytes have changed."""
    try:
        with safe_open(path, "numpy") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read ({error})") from None
    if digest_arrays(arrays) != checksum:
        raise DataError(f"{path} has changed bytes")
    return arrays


def to_triangle(matrix: Float[np.ndarray, "*E N N"]) -> Float[np.ndarray, "*E M"]:
    """Return the lower triangles of matrices, row after row."""
    return matrix[(..., *np.tril_indices(matrix.shape[-1]))]


def from_triangle(
    triangle: Float[np.ndarray, "*E M"], symmetric: bool
) -> Float[np.ndarray, "*E N N"]:
    """Return the matrices of lower triangles: symmetric, or zero above."""
    size = int(((8 * triangle.shape[-1] + 1) ** 0.5 - 1) / 2)
    whole = np.zeros((*triangle.shape[:-1], size, size), triangle.dtype)
    lower = np.tri(size, dtype=bool)  # indices would be larger than the matrix
    count = math.prod(triangle.shape[:-1])
    matrices = whole.reshape(count, size, size)
    rows = triangle.reshape(count, triangle.shape[-1])
    for one, values in zip(matrices, rows, strict=True):
        one[lower] = values
        if symmetric:
            one.T[lower] = values
    return whole
