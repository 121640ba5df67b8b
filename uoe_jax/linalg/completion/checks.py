"""What `complete` refuses, warns of, and derives from its arguments."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from uoe_jax.errors import ConfigError, shown
from uoe_jax.linalg.completion.entries import Entries, clean_entries, split_entries
from uoe_jax.linalg.completion.method import AXIS, Method, Solver
from uoe_jax.linalg.completion.problem import Problem

PACKAGE = f"{Path(__file__).parents[2]}/"  # whose frames a warning doesn't point to
COUNTS = ("iters", "passes", "patience")
POSITIVE = (*COUNTS, "clip_mu")


def hold_out(
    entries: Entries, holdout: float | Sequence[Any], key: Key[Array, ""]
) -> tuple[Entries, Entries | None]:
    """Return (entries to fit, entries to stop by or None)."""
    if isinstance(holdout, Sequence):
        if len(holdout) != 3:
            raise ConfigError(
                f"holdout has {len(holdout)} parts; give a fraction, or (rows, cols, "
                "values)"
            )
        rows, cols, values = holdout
        dtype = entries.values.dtype
        held = clean_entries(rows, cols, values, entries.shape, dtype=dtype)
        return entries, held
    if not holdout:
        return entries, None
    seed = int(jax.random.randint(jax.random.fold_in(key, 2), (), 0, 2**31 - 1))
    return split_entries(entries, holdout, seed)


def mean_value(entries: Entries) -> Array:
    """Return the weighted mean of the values."""
    values, weights = jnp.asarray(entries.values), entries.weights
    if weights is None:
        return values.mean()
    weights = jnp.asarray(weights)
    return jnp.sum(weights * values) / jnp.maximum(weights.sum(), 1e-30)


def make_solver(solver: Any) -> Solver:
    """Return a `Solver` from its kind, or as it is."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ConfigError(
            f"solver is {shown(solver)}; give the name of one, or a `Solver`"
        )
    return Solver(solver)


def check_dtype(dtype: Any) -> np.dtype:
    """Return float32 or float64; raise ConfigError for what jax would not use."""
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ConfigError(f"dtype is {shown(dtype)}; use float32 or float64") from None
    if dtype not in (np.float32, np.float64):
        raise ConfigError(f"dtype is {dtype}; use float32 or float64")
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "dtype is float64 but jax computes in float32; call "
            "jax.config.update('jax_enable_x64', True) first"
        )
    return dtype


def check_kernel(kernel: str, solver: Solver) -> str:
    """Return "bucket" or "segment"; raise ConfigError if the solver has none."""
    if kernel not in ("auto", "bucket", "segment"):
        raise ConfigError(f"kernel is {kernel!r}; use auto, bucket or segment")
    if kernel == "segment" and solver.kind not in ("auto", "cg"):
        raise ConfigError(
            f"kernel 'segment' has no {solver.kind!r} solver; use solver 'cg' or "
            "kernel 'bucket'"
        )
    return "bucket" if kernel == "auto" else kernel


def check_numbers(**given: Any) -> None:
    """Raise ConfigError for numbers that can't be: negative, infinite, no sweeps."""
    for name, value in given.items():
        if not _is_number(value):
            raise ConfigError(f"{name} is {shown(value)}; it must be a number")
        if not np.isfinite(value) or value < 0 or (name in POSITIVE and not value):
            bound = "above 0" if name in POSITIVE else "at least 0"
            raise ConfigError(f"{name} is {value}; it must be {bound}")
        if name in COUNTS and not _is_whole(value):
            raise ConfigError(f"{name} is {value}; it must be a whole number")


def _is_number(value: Any) -> bool:
    if isinstance(value, (str, bytes, bool)):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_rank(rank: Any, shape: tuple[int, int]) -> int:
    """Return the rank; raise ConfigError if the matrix is too small for it."""
    if isinstance(rank, bool) or not _is_whole(rank) or not 1 <= rank <= min(shape):
        raise ConfigError(
            f"rank is {rank!r}; a {shape[0]} x {shape[1]} matrix takes 1 to "
            f"{min(shape)}, or 'auto'"
        )
    return int(rank)


def count_shards(mesh: Any) -> int:
    """Return how many devices share the entries; ConfigError without a data axis."""
    if mesh is None:
        return 1
    if not isinstance(mesh, Mesh):
        raise ConfigError(
            f"mesh is {shown(mesh)}; give a jax mesh with an axis {AXIS!r}, or None"
        )
    if AXIS not in mesh.shape:
        raise ConfigError(
            f"the mesh has axes {list(mesh.shape)}; entries are split over {AXIS!r}: "
            f"jax.make_mesh((8,), ({AXIS!r},))"
        )
    return mesh.shape[AXIS]


def check_callback(callback: Any) -> None:
    """Raise ConfigError for what can't be called after a sweep."""
    if callback is not None and not callable(callback):
        raise ConfigError(
            f"callback is {shown(callback)}; give a function of a sweep's numbers"
        )


def warn_constant(entries: Entries) -> None:
    """Warn once, in one line, of values that are all the same."""
    low, high = float(entries.values.min()), float(entries.values.max())
    if low == high and entries.size > 1:
        warnings.warn(
            f"all values are {low:g}: there is nothing to learn, every "
            "prediction will be the same; implicit feedback (clicks, purchases) "
            "isn't supported, give ratings that differ",
            skip_file_prefixes=(PACKAGE,),
        )


def warn_degrees(problem: Problem, rank: int, method: Method) -> None:
    """Warn once, in one line, of unknowns with fewer entries than the rank."""
    if method.regularised:
        return
    counts = [
        int(((side.degree > 0) & (side.degree < rank)).sum())
        for side in (problem.rows, problem.cols)
    ]
    if any(counts):
        warnings.warn(
            f"rank {rank} exceeds the entries of {counts[0]} rows and {counts[1]} "
            "columns; these are underdetermined: set a ridge or lower the rank",
            skip_file_prefixes=(PACKAGE,),
        )
