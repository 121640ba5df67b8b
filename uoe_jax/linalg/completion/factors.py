"""The result of a completion: factors, predictions, storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uoe_jax.errors import DataError
from uoe_jax.files import local_path, parse_json, write_atomically
from uoe_jax.linalg.completion.entries import as_indices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """A completed matrix, `offset + row_bias + col_bias + u @ v.T`."""

    u: Float[Array, "M R"]
    v: Float[Array, "N R"]
    row_bias: Float[Array, " M"]
    col_bias: Float[Array, " N"]
    offset: Float[Array, ""]
    info: dict[str, Any] = field(default_factory=dict)  # see `complete`
    # Whether the model has biases, zero ones too; None: as the arrays look.
    biases: bool | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the completed matrix."""
        return self.u.shape[0], self.v.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns of each factor."""
        return self.u.shape[1]

    @property
    def has_biases(self) -> bool:
        """Whether rows and columns have biases beside the factors."""
        if self.biases is not None:
            return self.biases
        terms = (self.offset, self.row_bias, self.col_bias)
        return any(bool(jnp.any(term != 0)) for term in terms)

    def dense(self) -> Float[Array, "M N"]:
        """Return the whole matrix."""
        product = jnp.matmul(self.u, self.v.T, precision=jax.lax.Precision.HIGHEST)
        bias = self.row_bias[:, None] + self.col_bias[None, :]
        return self.offset + bias + product


@jax.jit
def predict_entries(
    u: Float[Array, "M R"],
    v: Float[Array, "N R"],
    row_bias: Float[Array, " M"],
    col_bias: Float[Array, " N"],
    offset: Float[Array, ""],
    rows: Int[Array, " X"],
    cols: Int[Array, " X"],
) -> Float[Array, " X"]:
    """Return the model at (rows, cols), indices unchecked; traceable."""
    product = jnp.sum(u[rows] * v[cols], axis=1)
    return offset + row_bias[rows] + col_bias[cols] + product


def predict(factors: Factors, rows: Any, cols: Any) -> Float[Array, " X"]:
    """Return the completed matrix at positions (rows, cols).

    Raises:
      DataError: an index that is no integer or outside the factors' shape.
    """
    rows, cols = as_indices(rows, "rows"), as_indices(cols, "cols")
    for name, index, size in (
        ("rows", rows, factors.shape[0]),
        ("cols", cols, factors.shape[1]),
    ):
        if not isinstance(index, jax.core.Tracer) and index.size:
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise DataError(
                    f"{name} holds {bad}; these factors know 0 to {size - 1}, "
                    "add new ones with partial_fit"
                )
    return predict_entries(
        factors.u,
        factors.v,
        factors.row_bias,
        factors.col_bias,
        factors.offset,
        rows,
        cols,
    )


def predict_known(factors: Factors, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return the completed matrix; an index of -1 adds no bias and no product.

    So a row that was never seen is predicted by the offset and the column's bias.
    """
    known = (rows >= 0) & (cols >= 0)
    model = np.array(
        predict(factors, np.where(known, rows, 0), np.where(known, cols, 0))
    )
    mean = np.full(len(rows), float(factors.offset), model.dtype)
    for index, bias in ((rows, factors.row_bias), (cols, factors.col_bias)):
        mean += np.where(index >= 0, np.asarray(bias)[np.maximum(index, 0)], 0)
    return np.where(known, model, mean)


def rmse(factors: Factors, rows: Any, cols: Any, values: Any) -> float:
    """Return the root mean squared error at the given entries."""
    error = predict(factors, rows, cols) - jnp.asarray(values)
    return float(jnp.sqrt(jnp.mean(error * error)))


def squared_error_interval(
    errors: np.ndarray, z: float = 1.96
) -> tuple[float, float, float]:
    """Return RMSE and its interval from a normal one of the mean squared error.

    Errors count as independent; 95% at the default z.
    """
    squares = np.asarray(errors, np.float64) ** 2
    mean = squares.mean()
    spread = squares.std(ddof=1) if squares.size > 1 else np.inf
    half = z * spread / squares.size**0.5
    return (
        float(mean**0.5),
        float(max(mean - half, 0.0) ** 0.5),
        float((mean + half) ** 0.5),
    )


def save_factors(factors: Factors, path: str | Path, **extra: np.ndarray) -> None:
    """Write a safetensors file with u, v, row_bias, col_bias, offset and `extra`.

    Strings among `extra` are written as their UTF-8 bytes, one after the other, and
    where each ends (`NAME.ends`). A reader sees the old file or the whole new one,
    never a part.
    """
    from safetensors.numpy import save

    file = local_path(path, "path")
    tensors = {
        name: np.ascontiguousarray(getattr(factors, name))
        for name in ("u", "v", "row_bias", "col_bias")
    }
    tensors["offset"] = np.asarray(factors.offset).reshape(1)
    tensors["biases"] = np.array([factors.has_biases])
    for name, array in extra.items():
        if array.dtype.kind in "UT":
            texts = [text.encode() for text in array.tolist()]
            tensors[f"{name}.ends"] = np.cumsum([len(t) for t in texts], dtype=np.int64)
            array = np.frombuffer(b"".join(texts), np.uint8)
        tensors[name] = np.ascontiguousarray(array)
    write_atomically(file, save(tensors, {"blake2b": _digest(tensors)}))


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of arrays and their names, shapes and types."""
    state = hashlib.blake2b(digest_size=16)
    for name, array in sorted(tensors.items()):
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def load_factors(path: str | Path) -> Factors:
    """Read factors written by `save_factors`; `info` holds whatever else was there.

    Raises:
      DataError: not a file of factors, or one whose bytes have changed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    # A pipe would wait for its writer for ever.
    file = local_path(path, "path")
    if not file.is_file():
        raise DataError(f"{path} is no file; give a file of completed factors")
    try:
        # Read, not mapped: a map of a file that is cut short ends the process.
        content = file.read_bytes()
        tensors = load(content)
        header = parse_json(
            content[8 : 8 + int.from_bytes(content[:8], "little")], str(path)
        )
        stated = header.get("__metadata__", {}).get("blake2b")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} can't be read as safetensors: {error}") from None
    names = ("u", "v", "row_bias", "col_bias", "offset")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DataError(f"{path} has no {missing}; give a file of completed factors")
    # Files of older versions carry no checksum.
    if stated is not None and stated != _digest(tensors):
        raise DataError(f"{path} has changed bytes; restore it, or complete again")
    u, v, row_bias, col_bias, offset = (jnp.asarray(tensors.pop(n)) for n in names)
    fits = (
        u.ndim == v.ndim == 2
        and u.shape[1] == v.shape[1]
        and row_bias.shape == u.shape[:1]
        and col_bias.shape == v.shape[:1]
        and offset.size == 1
    )
    if not fits:
        shapes = [list(x.shape) for x in (u, v, row_bias, col_bias, offset)]
        raise DataError(f"{path} has {names} of shapes {shapes}; they don't belong")
    # Files of older versions don't say.
    biases = bool(tensors.pop("biases")[0]) if "biases" in tensors else None
    for name in [name for name in tensors if f"{name}.ends" in tensors]:
        ends = tensors.pop(f"{name}.ends").tolist()
        whole = tensors[name].tobytes()
        texts = [whole[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
        tensors[name] = np.array(texts, dtype=np.dtypes.StringDType())
    return Factors(u, v, row_bias, col_bias, offset.reshape(()), tensors, biases)
