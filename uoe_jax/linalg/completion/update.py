"""Growing a completion: new or changed rows against factors that stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.errors import ConfigError
from uoe_jax.linalg.completion.als import solve_factor
from uoe_jax.linalg.completion.checks import check_numbers
from uoe_jax.linalg.completion.entries import as_indices, clean_entries
from uoe_jax.linalg.completion.factors import Factors
from uoe_jax.linalg.completion.method import (
    FixedFactor,
    Method,
    Penalties,
    Solver,
    make_penalties,
)
from uoe_jax.linalg.completion.problem import Side, fill, lay_out

ROUNDS = 3  # each one squares away what the exact solver's shift left behind


def partial_fit(
    factors: Factors,
    rows: Any,
    cols: Any,
    values: Any,
    *,
    axis: str = "rows",
    ridge: float = 0.0,
    bias_ridge: float | None = None,
    ridge_power: float = 0.0,
    weights: Any = None,
    solver: Solver | None = None,
) -> Factors:
    """Solve for the rows that occur in `rows` from these entries alone.

    Known rows are replaced, rows past the end are appended (those in between that have
    no entry are zero), everything else stays. With `axis="cols"` the same for columns.

    Args:
      factors: of a matrix already completed.
      rows: row of each entry, from 0.
      cols: column of each entry.
      values: value of each entry.
      axis: which side is solved for, "rows" or "cols".
      ridge: as in `complete`; use the same.
      bias_ridge: as in `complete`; a row bias is fitted if the factors have biases.
      ridge_power: as in `complete`.
      weights: of each entry.
      solver: None: exact.

    Raises:
      ConfigError, DataError: one line with the value, the rule and the fix.
    """
    if axis not in ("rows", "cols"):
        raise ConfigError(f"axis is {axis!r}; use 'rows' or 'cols'")
    if axis == "cols":
        solved = partial_fit(
            _transpose(factors),
            cols,
            rows,
            values,
            ridge=ridge,
            bias_ridge=bias_ridge,
            ridge_power=ridge_power,
            weights=weights,
            solver=solver,
        )
        return _transpose(solved)
    check_numbers(ridge=ridge, bias_ridge=bias_ridge or 0.0, ridge_power=ridge_power)
    dtype = factors.u.dtype
    if np.shape(rows) == (0,):
        return factors
    rows = as_indices(rows, "rows")
    size = max(factors.shape[0], int(rows.max()) + 1)
    shape = (size, factors.shape[1])
    entries = clean_entries(rows, cols, values, shape, weights=weights, dtype=dtype)
    biases = factors.has_biases
    layout = lay_out(entries, factors.rank + biases)
    side = fill(
        layout.rows,
        jnp.asarray(entries.values) - factors.offset,
        None if entries.weights is None else jnp.asarray(entries.weights),
        size,
    )
    tol = jnp.finfo(dtype).eps * 10
    penalties = make_penalties(ridge, bias_ridge, ridge_power, tol, dtype)
    method = Method(solver or Solver("exact"), bool(ridge), biases)
    solved = _solve_rows(side, factors, penalties, method)
    pad = size - factors.shape[0]
    u, bias = (
        jnp.pad(factors.u, ((0, pad), (0, 0))),
        jnp.pad(factors.row_bias, (0, pad)),
    )
    known = side.degree > 0
    u = jnp.where(known[:, None], solved[:, : factors.rank], u)
    if biases:
        bias = jnp.where(known, solved[:, -1], bias)
    return dataclasses.replace(factors, u=u, row_bias=bias)


def _solve_rows(
    side: Side, factors: Factors, penalties: Penalties, method: Method
) -> jax.Array:
    design = factors.v
    if method.biases:
        ones = jnp.ones((design.shape[0], 1), design.dtype)
        design = jnp.concatenate([design, ones], axis=1)
    fixed = FixedFactor(design, factors.col_bias, jnp.mean(design * design, axis=0))
    solution = jnp.zeros((side.degree.size, design.shape[1]), design.dtype)
    step = jax.jit(solve_factor, static_argnames="method")
    for _ in range(ROUNDS):
        key = jax.random.key(0)
        solution, _ = step(side, fixed, solution, penalties, key, method=method)
    return solution


def _transpose(factors: Factors) -> Factors:
    return Factors(
        factors.v,
        factors.u,
        factors.col_bias,
        factors.row_bias,
        factors.offset,
        factors.info,
        factors.biases,
    )
