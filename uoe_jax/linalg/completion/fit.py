"""`complete`: fill a low-rank matrix from some of its entries, sweep by sweep."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from uoe_jax import checks
from uoe_jax.errors import NonFiniteError
from uoe_jax.linalg.completion.als import place, run_sweep, start_state
from uoe_jax.linalg.completion.checks import (
    check_callback,
    check_dtype,
    check_kernel,
    check_numbers,
    check_rank,
    count_shards,
    hold_out,
    make_solver,
    mean_value,
    warn_constant,
    warn_degrees,
)
from uoe_jax.linalg.completion.entries import Entries, clean_entries, two_sizes
from uoe_jax.linalg.completion.factors import Factors, rmse
from uoe_jax.linalg.completion.flops import count_sweep
from uoe_jax.linalg.completion.method import Method, Penalties, Solver, make_penalties
from uoe_jax.linalg.completion.problem import EntryLayout, Problem, State, lay_out
from uoe_jax.linalg.completion.spectral import Start, spectral_gap_rank

MAX_AUTO_RANK = 32


def _settle(given: checks.Given) -> None:
    checks.flag(given, "biases")
    checks.flag(given, "split")
    checks.key(given, "key")
    check_callback(given["callback"])
    given["dtype"] = check_dtype(given["dtype"])
    given["solver"] = make_solver(given["solver"])
    count_shards(given["mesh"])
    if given["shape"] is not None:
        given["shape"] = two_sizes(given["shape"])
    names = ("tol", "ridge", "ridge_power", "clip_mu", "iters", "passes", "patience")
    bias_ridge = given["bias_ridge"]
    check_numbers(
        bias_ridge=0.0 if bias_ridge is None else bias_ridge,
        **{name: given[name] for name in names},
    )


@checks.checked(_settle)
def complete(
    rows: Any,
    cols: Any,
    values: Any,
    shape: Sequence[SupportsIndex] | None = None,
    rank: int | str = 8,
    *,
    solver: str | Solver = "auto",
    tol: float = 1e-5,
    iters: int = 50,
    ridge: float = 0.0,
    bias_ridge: float | None = None,
    ridge_power: float = 0.0,
    biases: bool = False,
    weights: Any = None,
    clip_mu: float = 3.0,
    split: bool = False,
    holdout: float | Sequence[Any] = 0.0,
    patience: int = 3,
    kernel: str = "auto",
    duplicates: str = "mean",
    dtype: Any = np.float32,
    mesh: Mesh | None = None,
    key: Key[Array, ""] | None = None,
    passes: int = 6,
    callback: Callable[[dict[str, float]], None] | None = None,
) -> Factors:
    """Complete a low-rank matrix by robust alternating minimisation.

    Minimises sum of weight * (value - offset - row_bias - col_bias - u.v)^2 plus
    ridge * n**ridge_power * |u|^2 (n: the summed weight of a row's entries, which is
    their number without weights; likewise for v and biases).
    Gu, Song, Yin, Zhang, arXiv 2302.11068; the practical form: all entries in every
    sweep, each half-step started from the last factor in the new basis.

    Args:
      rows: row of each observed entry, from 0. numpy arrays are laid out on the host,
        jax arrays on their device.
      cols: column of each entry.
      values: value of each entry.
      shape: of the matrix; None: just large enough.
      rank: of the model, or "auto": before the largest gap of the spectrum, seen above
        the noise of the entries left out (at most 32).
      solver: "exact", "cg", "sketch", "auto", or a `Solver` with everything set.
      tol: relative accuracy of each half-step, and the relative change of the training
        RMSE below which sweeps stop.
      iters: sweeps at most.
      ridge: penalty of the factors; 0 keeps one factor orthonormal instead.
      bias_ridge: penalty of the biases; None: `ridge`.
      ridge_power: 0 for a constant ridge, 1 for one that grows with the summed weight.
      biases: add an offset (the mean), row biases and column biases.
      weights: of each entry in the squared error.
      clip_mu: above 0; rows of the spectral start's orthonormal factors are cut to the
        norm 2 clip_mu sqrt(rank / rows), so that no row stands out (incoherence).
      split: the theory's form: each half-step sees its own random part of the entries.
      holdout: fraction of entries, or (rows, cols, values), to stop early by.
      patience: sweeps without a better held-out error before stopping.
      kernel: "bucket", "segment" (CG only, no padding), or "auto" (buckets).
      duplicates: "mean" or "error".
      dtype: float32 or float64 (with jax_enable_x64).
      mesh: devices with an axis "data": entries split over it, factors gathered.
      key: of the spectral start, the sketches and the splits.
      passes: of the spectral start over the entries (twice each).
      callback: called after each sweep with its numbers.

    Returns:
      Factors. `info` holds, one line a sweep: train_rmse (after the column half-step),
      loss (weighted squared error before each half-step), steps (iterations of the
      slowest problem), flops, and valid_rmse; and singular_values (of the start),
      empty_rows, empty_cols (their factors are zero), num_duplicates, best_sweep.

    Raises:
      ConfigError, DataError: one line with the value, the rule and the fix.
      NonFiniteError: the iteration diverged.
    """
    shards = count_shards(mesh)
    key = jax.random.key(0) if key is None else key
    entries = clean_entries(
        rows, cols, values, shape, weights=weights, duplicates=duplicates, dtype=dtype
    )
    warn_constant(entries)
    entries, held = hold_out(entries, holdout, key)
    method = Method(make_solver(solver), ridge > 0 or bool(bias_ridge), biases, mesh)
    kernel = check_kernel(kernel, method.solver)
    width = MAX_AUTO_RANK if rank == "auto" else check_rank(rank, entries.shape)
    layout = lay_out(entries, width + biases, kernel=kernel, shards=shards)
    offset = mean_value(entries) if biases else jnp.zeros((), dtype)
    problems = SweepProblems(entries, layout, offset, mesh, iters if split else 0, key)
    whole = problems.whole
    start = Start(width, clip_mu, passes)
    if rank == "auto":
        found = _gap_rank(problems, key, method, start)
        start = start._replace(rank=found)
    state, singular = start_state(whole, key, method, start)
    warn_degrees(whole, start.rank, method)
    penalties = make_penalties(ridge, bias_ridge, ridge_power, tol, dtype)
    stop = StopRule(iters, tol, patience)
    state, info = run_sweeps(problems, state, penalties, method, stop, held, callback)
    empty = {
        "empty_rows": np.asarray(whole.rows.degree == 0),
        "empty_cols": np.asarray(whole.cols.degree == 0),
    }
    info |= empty | {
        "singular_values": np.asarray(singular),
        "num_duplicates": np.asarray(entries.num_duplicates),
    }
    return Factors(*state, offset, info, biases)


def _gap_rank(
    problems: SweepProblems, key: Key[Array, ""], method: Method, start: Start
) -> int:
    entries = problems.entries
    most = min(MAX_AUTO_RANK, *entries.shape)
    if most == 1:
        return 1
    start = start._replace(rank=most)
    state, singular = start_state(problems.whole, key, method, start)
    # Leaving entries out is noise, whose size follows the values: uneven over rows
    # and columns. Random signs keep every size and take the structure away, so the
    # largest singular value that is left is the noise's edge (Hong, Sheng, Dobriban,
    # arXiv 2012.02985). An entry seen with probability p, divided by p, has the second
    # moment x^2 / p with a random sign, and the variance x^2 (1 - p) / p without; with
    # weights p is (sum of weights)^2 / (entries * sum of their squares).
    values = jnp.asarray(entries.values) - problems.offset
    values -= state.row_bias[entries.rows] + state.col_bias[entries.cols]
    zero = jnp.zeros_like(problems.offset)
    if method.biases:
        # Damped means leave a tenth of themselves, which isn't of the factors' rank.
        _, singular = start_state(problems.of_start(values, zero), key, method, start)
    draw = jax.random.fold_in(key, 2)
    signs = jax.random.rademacher(draw, values.shape, values.dtype)
    flipped = problems.of_start(signs * values, zero)
    _, noise = start_state(flipped, key, method, start)
    weights = problems.start_weights
    seen = entries.size
    if weights is not None:
        weights = jnp.asarray(weights)
        seen = float(jnp.sum(weights) ** 2 / jnp.sum(weights * weights))
    left_out = 1 - seen / math.prod(entries.shape)
    return int(spectral_gap_rank(singular, noise[0] * max(left_out, 0.0) ** 0.5))


class SweepProblems:
    """The problem of each half-step: always the whole one, or its part of a split."""

    def __init__(
        self,
        entries: Entries,
        layout: EntryLayout,
        offset: Array,
        mesh: Mesh | None,
        splits: int,  # sweeps that see an own part in each half-step; 0: none
        key: Key[Array, ""],
    ):
        self.entries, self.layout, self.offset = entries, layout, offset
        self.mesh, self.splits = mesh, splits
        if splits:  # the start has a part too
            draw = jax.random.fold_in(key, 1)
            self.part = jax.random.randint(draw, (entries.size,), 0, 2 * splits + 1)

    @functools.cached_property
    def start_weights(self) -> Any:
        """Weights of the entries in the start; None: all are 1."""
        return self._part(0) if self.splits else self.entries.weights

    @functools.cached_property
    def whole(self) -> Problem:
        """The problem of all entries; of a split, the start's."""
        return self.of_start(self.entries.values, self.offset)

    def of_start(self, values: Any, offset: Array) -> Problem:
        """Return the start's problem with these values, one for each entry."""
        problem = self.layout.problem(values, self.start_weights, offset)
        return place(problem, self.mesh)

    def of_sweep(self, number: int) -> Problem:
        """Return the problem of sweep `number`: one part for each half-step."""
        if not self.splits:
            return self.whole
        cols, rows = (
            self._fill(self._part(1 + first + number)) for first in (0, self.splits)
        )
        return cols._replace(rows=rows.rows)

    def _part(self, number: int) -> Array:
        """Return the entries' weights in one part of a split, 0 outside it."""
        weights = (self.part == number).astype(self.entries.values.dtype)
        if self.entries.weights is not None:
            weights = weights * jnp.asarray(self.entries.weights)
        return weights

    def _fill(self, weights: Array) -> Problem:
        problem = self.layout.problem(self.entries.values, weights, self.offset)
        return place(problem, self.mesh)


class StopRule(NamedTuple):
    """When sweeps end."""

    iters: int
    tol: float  # relative change of the training error
    patience: int  # sweeps without a better held-out error


def run_sweeps(
    problems: SweepProblems,
    state: State,
    penalties: Penalties,
    method: Method,
    stop: StopRule,
    held: Entries | None,
    callback: Callable[[dict[str, float]], None] | None,
) -> tuple[State, dict[str, Any]]:
    """Sweep until the training error settles or the held-out error stops falling."""
    history: list[dict[str, Any]] = []
    best, best_sweep, best_error = state, 0, np.inf
    previous = np.inf
    for number in range(stop.iters):
        problem = problems.of_sweep(number)
        key = jax.random.fold_in(jax.random.key(1), number)
        state, stats = run_sweep(problem, state, penalties, key, method)
        total = float(problem.rows.degree.sum())
        line = _line(problems.layout, method, state, stats, total)
        if not np.isfinite(line["loss"]).all():
            raise NonFiniteError(
                f"completion diverged in sweep {number + 1}; raise ridge, lower rank "
                "or use float64"
            )
        error = line["train_rmse"]
        if held is not None:
            factors = Factors(*state, problems.offset)
            error = rmse(factors, held.rows, held.cols, held.values)
            line["valid_rmse"] = error
        history.append(line)
        if callback is not None:
            callback({"sweep": number + 1, **line})
        if held is None or error < best_error:
            best, best_sweep, best_error = state, number, error
        change = abs(previous - line["train_rmse"])
        if not problems.splits and change <= stop.tol * line["train_rmse"]:
            break
        if held is not None and number - best_sweep >= stop.patience:
            break
        previous = line["train_rmse"]
    info = {name: np.asarray([x[name] for x in history]) for name in history[0]}
    return best, info | {"best_sweep": np.asarray(best_sweep)}


def _line(
    layout: EntryLayout, method: Method, state: State, stats: tuple, total: float
) -> dict[str, Any]:
    rank = state.u.shape[1]
    first, second = count_sweep(layout, method, rank, stats)
    return {
        "train_rmse": (float(stats[1].loss) / max(total, 1e-30)) ** 0.5,
        "loss": np.array([float(s.loss) for s in stats]),
        "steps": np.array([int(s.max_steps) for s in stats]),
        "flops": np.array([first.total, second.total]),
    }
