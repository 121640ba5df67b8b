"""Spectral start: leading singular vectors of the rescaled, zero-filled matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from uoe_jax.linalg.completion.method import Method, gather
from uoe_jax.linalg.completion.problem import Problem, Run, Side, State
from uoe_jax.linalg.lowrank import orthonormalise, subspace_svd


def sparse_times(
    side: Side,
    x: Float[Array, "M R"],
    own: Float[Array, " N"],
    shift: Float[Array, " M"],
    axis_name: str | None = None,
) -> Float[Array, "N R"]:
    """Return the side's zero-filled matrix `[N, M]` times `x`; one pass, 2 X R FLOPs.

    `own` and `shift` are subtracted from the values first (biases).
    """
    num_unknown = own.shape[0]
    if isinstance(side.blocks, Run):
        unknown, index, values, weights = side.blocks.flat()
        values = values - gather(own, unknown) - gather(shift, index)
        values = values if weights is None else values * weights
        total = jax.ops.segment_sum(
            values[:, None] * gather(x, index),
            unknown,
            num_unknown,
            indices_are_sorted=True,
        )
    else:
        total = jnp.zeros((num_unknown, x.shape[1]), x.dtype)
        for block in side.blocks:

            def one_chunk(block: tuple) -> Array:
                ids, index, values, weights = block
                values = values - gather(own, ids)[:, None] - gather(shift, index)
                values = values if weights is None else values * weights
                return jnp.sum(values[..., None] * gather(x, index), axis=1)

            y = jax.lax.map(one_chunk, block)
            ids = block.ids.reshape(-1)
            total = total.at[ids].set(y.reshape(ids.size, -1), mode="drop")
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def trim(degree: Float[Array, " N"]) -> Float[Array, " N"]:
    """Return factors that make a heavy row count as one of twice the mean degree.

    Heavier rows would pull singular vectors to themselves (Keshavan, Montanari, Oh
    2010 zero them; scaling keeps what they know).
    """
    known = jnp.maximum(jnp.sum(degree > 0), 1)
    limit = 2 * jnp.sum(degree) / known
    return jnp.where(degree > limit, limit / jnp.where(degree > 0, degree, 1), 1)


def clip_rows(x: Float[Array, "M R"], mu: float) -> Float[Array, "M R"]:
    """Scale rows of an orthonormal factor down to norm `2 mu sqrt(R / M)`.

    M counts the rows that aren't empty; direction and small rows stay as they are.
    """
    norm = jnp.linalg.norm(x, axis=1)
    known = jnp.maximum(jnp.sum(norm > 0), 1)
    limit = 2 * mu * jnp.sqrt(x.shape[1] / known).astype(x.dtype)
    return x * jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)[:, None]


def start_biases(
    problem: Problem, axis_name: str | None = None, damping: float = 10.0
) -> tuple[Float[Array, " M"], Float[Array, " N"]]:
    """Return damped mean residuals of columns, then of rows."""
    rows, cols = problem.rows.degree, problem.cols.degree
    zero_rows, zero_cols = jnp.zeros_like(rows), jnp.zeros_like(cols)
    ones = jnp.ones((rows.size, 1), rows.dtype)
    total = sparse_times(problem.cols, ones, zero_cols, zero_rows, axis_name)
    col_bias = total[:, 0] / (cols + damping)
    ones = jnp.ones((cols.size, 1), cols.dtype)
    total = sparse_times(problem.rows, ones, zero_rows, col_bias, axis_name)
    # Damped: the mean of a row's few entries says more of their noise than of the row.
    return total[:, 0] / (rows + damping), col_bias


def spectrum(
    problem: Problem,
    row_bias: Float[Array, " M"],
    col_bias: Float[Array, " N"],
    rank: int,
    key: Key[Array, ""],
    passes: int,
    axis_name: str | None = None,
) -> tuple[Float[Array, "M R"], Float[Array, " R"], Float[Array, "N R"]]:
    """Return leading singular triplets of the trimmed residual, divided by its density.

    Cost: 2 `passes` products of the sparse matrix with `rank + 10` vectors.
    """
    row_scale, col_scale = trim(problem.rows.degree), trim(problem.cols.degree)
    density = jnp.sum(row_scale * problem.rows.degree) / row_scale.size
    density = density / col_scale.size

    def multiply(x: Array) -> Array:
        y = sparse_times(
            problem.rows, col_scale[:, None] * x, row_bias, col_bias, axis_name
        )
        return row_scale[:, None] * y

    def transpose_multiply(x: Array) -> Array:
        # By the columns' own order of entries: the terms of a sum are neighbours.
        y = sparse_times(
            problem.cols, row_scale[:, None] * x, col_bias, row_bias, axis_name
        )
        return col_scale[:, None] * y

    u, s, v = subspace_svd(
        multiply,
        transpose_multiply,
        (row_scale.size, col_scale.size),
        rank,
        key,
        passes=passes,
        dtype=row_scale.dtype,
    )
    # Zeros stand for the unknown entries: values are low by the share that is known.
    return u, s / density, v


class Start(NamedTuple):
    """What a spectral start is made by."""

    rank: int
    clip_mu: float = 3.0  # rows are clipped to 2 clip_mu sqrt(rank / rows)
    passes: int = 6  # over the entries, twice each


def spectral_start(
    problem: Problem, key: Key[Array, ""], method: Method, start: Start
) -> tuple[State, Float[Array, " R"]]:
    """Return the first state and the singular values; no derivative flows back.

    Without a ridge u is an orthonormal basis; with one, both factors share the
    singular values evenly, as the penalty does at its minimum.
    """
    problem = jax.tree.map(jax.lax.stop_gradient, problem)
    row_bias = jnp.zeros_like(problem.rows.degree)
    col_bias = jnp.zeros_like(problem.cols.degree)
    if method.biases:
        row_bias, col_bias = start_biases(problem, method.axis_name)
    rank, clip_mu, passes = start
    u, s, v = spectrum(problem, row_bias, col_bias, rank, key, passes, method.axis_name)
    # Clipped rows leave the columns no longer orthonormal. v is solved for first, from
    # whatever it is.
    u = orthonormalise(clip_rows(u, clip_mu))[0]
    v = clip_rows(v, clip_mu)
    root = jnp.sqrt(s)[None, :]
    state = (u * root, v * root) if method.regularised else (u, v * s[None, :])
    return State(*state, row_bias, col_bias), s


def spectral_gap_rank(
    singular: Float[Array, " R"], edge: Float[Array, ""]
) -> Int[Array, ""]:
    """Return the rank before the largest relative gap, among values above the noise.

    Noise with the largest singular value `edge` lifts each value y of the spectrum, the
    small ones most, and so hides the gap behind the last one. Gaps are those of
    sqrt(y^2 - edge^2), the best shrinkage for a square matrix and squared error
    (Gavish and Donoho, arXiv 1405.7511, equation 7).
    """
    # A value nearer to the edge than its own spread counts as one that is just above.
    least = jnp.maximum(0.3 * edge, jnp.finfo(singular.dtype).eps * singular[0])
    shrunk = jnp.sqrt(jnp.maximum(singular**2 - edge**2, least**2))
    gap = shrunk[:-1] / shrunk[1:]
    return 1 + jnp.argmax(jnp.where(shrunk[:-1] > least, gap, 0))
