"""Sketches: short random combinations of many rows, for batches of tall matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uoe_jax.errors import ConfigError, nearest

SKETCHES = ("countsketch", "srht")


def count_sketch(
    a: Float[Array, "C S R"], rows: int, key: Key[Array, ""]
) -> Float[Array, "C Q R"]:
    """Add every row of `a`, with a random sign, to one of `rows` random rows.

    Cost: one pass over `a`. The draw is shared by the whole batch. Singular values of
    `a` times the inverse of the sketch's R lie in `1 / (1 +- c**-0.5)` for
    `rows = c * R` (Clarkson and Woodruff 2013; constants measured).
    """
    height = a.shape[1]
    hash_key, sign_key = jax.random.split(key)
    target = jax.random.randint(hash_key, (height,), 0, rows)
    sign = jax.random.rademacher(sign_key, (height,), dtype=a.dtype)
    empty = jnp.zeros((a.shape[0], rows, a.shape[2]), a.dtype)
    return empty.at[:, target].add(sign[None, :, None] * a)


def walsh_hadamard(a: Float[Array, "C S R"]) -> Float[Array, "C S R"]:
    """Return the orthonormal Walsh-Hadamard transform along S, a power of two."""
    chunk, height, rank = a.shape
    step = 1
    while step < height:
        pair = a.reshape(chunk, height // (2 * step), 2, step, rank)
        top, bottom = pair[:, :, 0], pair[:, :, 1]
        a = jnp.stack([top + bottom, top - bottom], axis=2)
        a = a.reshape(chunk, height, rank)
        step *= 2
    return a / height**0.5


def srht(
    a: Float[Array, "C S R"], rows: int, key: Key[Array, ""]
) -> Float[Array, "C Q R"]:
    """Return a subsampled randomised Hadamard transform of `a`, `rows` rows high.

    Cost: `S log S` per column. S is padded to a power of two; at least `rows`.
    """
    height = 1 << max(a.shape[1] - 1, rows - 1, 0).bit_length()
    sign_key, row_key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, (a.shape[1],), dtype=a.dtype)
    padded = jnp.pad(
        sign[None, :, None] * a, ((0, 0), (0, height - a.shape[1]), (0, 0))
    )
    picked = jax.random.choice(row_key, height, (rows,), replace=False)
    return walsh_hadamard(padded)[:, picked] * (height / rows) ** 0.5


def sketch_rows(
    a: Float[Array, "C S R"], rows: int, key: Key[Array, ""], kind: str = "countsketch"
) -> Float[Array, "C Q R"]:
    """Sketch each matrix of a batch to `rows` rows; a short one passes unchanged.

    Raises:
      ConfigError: unknown `kind`.
    """
    if kind not in SKETCHES:
        raise ConfigError(f"sketch is {kind!r}; {nearest(kind, SKETCHES)}")
    if a.shape[1] <= rows:
        return a
    return (count_sketch if kind == "countsketch" else srht)(a, rows, key)
