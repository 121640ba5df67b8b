"""Orthonormal bases, subspace iteration and subspace distance."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

HIGHEST = jax.lax.Precision.HIGHEST


def matmul(
    a: Float[Array, "*B M N"], b: Float[Array, "*B N R"]
) -> Float[Array, "*B M R"]:
    """Return `a @ b` in full precision (no TF32 or bf16 passes)."""
    return jnp.matmul(a, b, precision=HIGHEST)


def orthonormalise(
    factor: Float[Array, "M R"],
) -> tuple[Float[Array, "M R"], Float[Array, "R R"]]:
    """Return `q, r` with `q @ r = factor` and orthonormal `q`; `r` has no gradient.

    Shifted CholeskyQR3 (Fukaya et al., 2020, arXiv 1809.11085): three Gram products
    and no Householder sweep, so it is a matrix product on every device. A column that
    depends on the others comes back as (nearly) zero instead of NaN.
    """
    rank = factor.shape[1]
    eye = jnp.eye(rank, dtype=factor.dtype)
    shift = 11.0 * rank * jnp.finfo(factor.dtype).eps

    def one_pass(_: Array | int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        q, r = state
        gram = matmul(q.T, q)
        # Without the floor an all-zero factor would be divided by zero.
        floor = shift * jnp.trace(gram) / rank + jnp.finfo(factor.dtype).tiny ** 0.5
        lower = jax.lax.stop_gradient(jnp.linalg.cholesky(gram + floor * eye))
        inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
        return matmul(q, inverse.T), matmul(lower.T, r)

    # A loop, not three copies: less to compile.
    q, r = jax.lax.fori_loop(0, 3, one_pass, (factor, eye))
    return q, r


def principal_axes(
    factor: Float[Array, "M R"],
) -> tuple[Float[Array, "R R"], Float[Array, " R"]]:
    """Return the rotation that makes `factor`'s columns orthogonal, and their energies.

    Neither carries a gradient: a rotation of both factors leaves their product alone.
    """
    gram = jax.lax.stop_gradient(matmul(factor.T, factor))
    energy, axes = jnp.linalg.eigh(gram)
    return axes, jnp.maximum(energy, 0.0)


def subspace_svd(
    multiply: Callable[[Array], Array],
    transpose_multiply: Callable[[Array], Array],
    shape: tuple[int, int],
    rank: int,
    key: Key[Array, ""],
    *,
    passes: int = 5,
    oversample: int = 10,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "M R"], Float[Array, " R"], Float[Array, "N R"]]:
    """Return the leading singular triplets of a matrix known by its products.

    Randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4).

    Args:
      multiply: maps `[N, R]` to `[M, R]`.
      transpose_multiply: maps `[M, R]` to `[N, R]`.
      shape: (M, N).
      rank: how many triplets to return.
      key: random key of the start.
      passes: how often the matrix and its transpose are applied.
      oversample: extra columns carried along, for accuracy.
      dtype: of the start.
    """
    num_rows, num_cols = shape
    width = min(rank + oversample, *shape)
    right = jax.random.normal(key, (num_cols, width), dtype)

    def one_pass(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        left = orthonormalise(multiply(state[1]))[0]
        return left, *orthonormalise(transpose_multiply(left))

    left = jnp.zeros((num_rows, width), dtype)
    core = jnp.zeros((width, width), dtype)
    left, right, core = jax.lax.fori_loop(0, passes, one_pass, (left, right, core))
    # transpose = right @ core @ left.T, so the matrix is left @ core.T @ right.T.
    inner_left, singular, inner_right = jnp.linalg.svd(core.T, full_matrices=False)
    left = matmul(left, inner_left[:, :rank])
    return left, singular[:rank], matmul(right, inner_right[:rank].T)


def subspace_distance(
    a: Float[Array, "M R"], b: Float[Array, "M Q"]
) -> Float[Array, ""]:
    """Return `||(I - P_b) a||_2` for the column spaces of `a` and `b`, in [0, 1]."""
    a, b = jnp.linalg.qr(a)[0], jnp.linalg.qr(b)[0]
    return jnp.linalg.norm(a - matmul(b, matmul(b.T, a)), ord=2)
