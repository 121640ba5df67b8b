"""The outer loop: sweeps until the error settles, on the whole or on split entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from uoe_jax.errors import NonFiniteError
from uoe_jax.linalg.completion.entries import Entries
from uoe_jax.linalg.completion.factors import Factors, rmse
from uoe_jax.linalg.completion.half import Hyper
from uoe_jax.linalg.completion.layout import Problem
from uoe_jax.linalg.completion.problem import Layout
from uoe_jax.linalg.completion.run import Method, place, run_sweep
from uoe_jax.linalg.completion.step import State
from uoe_jax.linalg.completion.tally import count_sweep


class Parts:
    """The problem of each half-step: always the whole one, or its part of a split."""

    def __init__(
        self,
        entries: Entries,
        layout: Layout,
        offset: Array,
        mesh: Mesh | None,
        count: int,
        key: Key[Array, ""],
    ):
        self.entries, self.layout, self.offset = entries, layout, offset
        self.mesh, self.count, self.size = mesh, count, entries.size
        self.part = None
        if count > 1:
            draw = jax.random.fold_in(key, 1)
            self.part = jax.random.randint(draw, (entries.size,), 0, count)
        self._whole = None

    def problem(self, number: int) -> Problem:
        """Return the problem of part `number` (part 0 is the start's)."""
        if self.part is None:
            if self._whole is None:
                self._whole = self._fill(self.entries.weights)
            return self._whole
        weights = (self.part == number).astype(self.entries.values.dtype)
        if self.entries.weights is not None:
            weights = weights * jnp.asarray(self.entries.weights)
        return self._fill(weights)

    def _fill(self, weights: Any) -> Problem:
        problem = self.layout.problem(self.entries.values, weights, self.offset)
        return place(problem, self.mesh)

    def sweep_problem(self, number: int, iters: int) -> Problem:
        """Return the problem of sweep `number`: one part for each half-step."""
        if self.part is None:
            return self.problem(0)
        cols, rows = self.problem(1 + number), self.problem(1 + iters + number)
        return cols._replace(rows=rows.rows)


def run_sweeps(
    parts: Parts,
    state: State,
    hyper: Hyper,
    method: Method,
    iters: int,
    tol: float,
    held: Entries | None,
    patience: int,
    callback: Callable[[dict[str, float]], None] | None,
) -> tuple[State, dict[str, Any]]:
    """Sweep until the training error settles or the held-out error stops falling."""
    history: list[dict[str, Any]] = []
    best, best_sweep, best_error = state, 0, np.inf
    previous = np.inf
    for number in range(iters):
        problem = parts.sweep_problem(number, iters)
        key = jax.random.fold_in(jax.random.key(1), number)
        state, stats = run_sweep(problem, state, hyper, key, method, parts.mesh)
        total = float(problem.rows.degree.sum())
        line = _line(parts.layout, method, state, stats, total)
        if not np.isfinite(line["loss"]).all():
            raise NonFiniteError(
                f"completion diverged in sweep {number + 1}; raise ridge, lower rank "
                "or use float64"
            )
        error = line["train_rmse"]
        if held is not None:
            factors = Factors(*state, parts.offset)
            error = rmse(factors, held.rows, held.cols, held.values)
            line["valid_rmse"] = error
        history.append(line)
        if callback is not None:
            callback({"sweep": number + 1, **line})
        if held is None or error < best_error:
            best, best_sweep, best_error = state, number, error
        change = abs(previous - line["train_rmse"])
        if not parts.count > 1 and change <= tol * line["train_rmse"]:
            break
        if held is not None and number - best_sweep >= patience:
            break
        previous = line["train_rmse"]
    info = {name: np.asarray([x[name] for x in history]) for name in history[0]}
    return best, info | {"best_sweep": np.asarray(best_sweep)}


def _line(
    layout: Layout, method: Method, state: State, stats: tuple, total: float
) -> dict[str, Any]:
    rank = state.u.shape[1]
    first, second = count_sweep(layout, method, rank, stats)
    return {
        "train_rmse": (float(stats[1].loss) / max(total, 1e-30)) ** 0.5,
        "loss": np.array([float(s.loss) for s in stats]),
        "steps": np.array([int(s.max_steps) for s in stats]),
        "flops": np.array([first.total, second.total]),
    }
