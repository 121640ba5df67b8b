"""Completing a dense matrix observed in part: a weight, an attention map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from uoe_jax.errors import DataError
from uoe_jax.linalg.completion.als import alternate
from uoe_jax.linalg.completion.entries import clean_entries
from uoe_jax.linalg.completion.factors import Factors
from uoe_jax.linalg.completion.fit import complete
from uoe_jax.linalg.completion.method import Method, Solver, make_penalties
from uoe_jax.linalg.completion.problem import lay_out
from uoe_jax.linalg.completion.spectral import Start, spectral_start


def complete_matrix(
    matrix: Shaped[Any, "M N"],
    observed: Any,  # [M, N] flags
    rank: int | str = 8,
    *,
    keep_observed: bool = True,
    **options: Any,
) -> tuple[Float[Array, "M N"], Factors]:
    """Return `matrix` with its unobserved entries filled in, and the factors.

    Args:
      matrix: any values where `observed` is false (NaN too).
      observed: mask, true where the matrix is known.
      rank: of the model, or "auto".
      keep_observed: keep known entries as they are, instead of the model's.
      **options: of `complete`.

    Raises:
      ConfigError, DataError: as `complete`; a mask of another shape.
    """
    matrix, observed = np.asarray(matrix), np.asarray(observed, bool)
    if matrix.shape != observed.shape:
        raise DataError(
            f"the mask is {observed.shape} but the matrix {matrix.shape}; give one "
            "flag for each entry"
        )
    rows, cols = np.nonzero(observed)
    factors = complete(rows, cols, matrix[rows, cols], matrix.shape, rank, **options)
    model = factors.dense()
    if keep_observed:
        known = jnp.asarray(np.where(observed, matrix, 0).astype(model.dtype))
        model = jnp.where(jnp.asarray(observed), known, model)
    return model, factors


def make_completer(
    rows: Any,
    cols: Any,
    shape: Sequence[SupportsIndex],
    rank: int,
    *,
    iters: int = 20,
    ridge: float = 0.0,
    solver: Solver | None = None,
    tol: float = 1e-6,
    clip_mu: float = 3.0,
    passes: int = 6,
    dtype: Any = np.float32,
) -> Any:
    """Return `fn(values, weights=None) -> Factors`-like (u, v), a pure function.

    The positions are fixed, so `fn` can go under jit, grad and vmap. Derivatives of
    `u @ v.T` are right: implicit in every half-step, unrolled over the sweeps. The
    spectral start carries none, which matters only before convergence.
    """
    solver = solver or Solver("exact")
    dummy = np.zeros(np.shape(rows), dtype)
    entries = clean_entries(rows, cols, dummy, shape, duplicates="error", dtype=dtype)
    layout = lay_out(entries, rank)
    method, start = Method(solver, ridge > 0, False), Start(rank, clip_mu, passes)

    def run(
        values: Float[Array, " X"], weights: Float[Array, " X"] | None = None
    ) -> tuple[Float[Array, "M R"], Float[Array, "N R"]]:
        problem = layout.problem(values, weights, jnp.zeros((), values.dtype))
        key = jax.random.key(0)
        state, _ = spectral_start(problem, key, method, start)
        penalties = make_penalties(ridge, 0.0, 0.0, tol, values.dtype)
        state, _ = alternate(problem, state, penalties, key, iters, method)
        return state.u, state.v

    return run
