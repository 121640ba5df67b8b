"""The fit of `uoe complete`: entries held out, a ridge chosen, progress shown."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from uoe_jax.complete.options import CompleteArgs
from uoe_jax.complete.read import Table
from uoe_jax.errors import ConfigError
from uoe_jax.linalg.completion import Factors, complete

RIDGES = (0.3, 1.0, 1.5, 3.0)  # tried when none is given, times the values' deviation


class Parts(NamedTuple):
    """Which entries train, choose and report; and how many repeat a position."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    repeats: int


def split(table: Table, holdout: float, seed: int) -> Parts:
    """Return a random split; half of the held-out positions choose, half report.

    Entries of one position stay together: apart, the fit would have seen the answer.
    """
    key = table.rows.astype(np.int64) * len(table.col_ids) + table.cols
    positions, place = np.unique(key, return_inverse=True)
    size = len(positions)
    count = round(holdout * size)
    if holdout and not 2 <= count < size:
        raise ConfigError(
            f"holdout is {holdout} of {size} entries; it must leave at least 2 held "
            "out and 1 to train on"
        )
    order = np.random.default_rng(seed).permutation(size)
    part = np.zeros(size, np.int8)
    part[order[: count // 2]] = 1
    part[order[count // 2 : count]] = 2
    train, valid, test = (np.flatnonzero(part[place] == number) for number in range(3))
    return Parts(train, valid, test, len(key) - size)


def fit(
    args: CompleteArgs, table: Table, parts: Parts, console: Console
) -> tuple[Factors, float]:
    """Return the best factors over the ridges to try, and that ridge."""
    deviation = float(table.values[parts.train].std()) or 1.0
    if args.ridge is not None:
        ridges = [args.ridge]
    else:  # nothing held out, nothing to choose by
        ridges = [r * deviation for r in (RIDGES if len(parts.valid) else (1.0,))]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=args.quiet or not console.is_terminal,
        transient=True,
    )
    found = []
    with bar:
        for ridge in ridges:
            factors = _fit_one(args, table, parts, ridge, bar)
            error = float(factors.info.get("valid_rmse", np.zeros(1)).min())
            found.append((error, ridge, factors))
            if len(ridges) > 1:
                console.print(f"ridge {ridge:.3g}: RMSE {error:.5f} where it chooses")
    _, ridge, factors = min(found, key=lambda line: line[0])
    return factors, ridge


def _fit_one(
    args: CompleteArgs, table: Table, parts: Parts, ridge: float, bar: Progress
) -> Factors:
    task = bar.add_task(f"ridge {ridge:.3g}", total=args.iters, note="")

    def show(line: dict) -> None:
        error = line.get("valid_rmse", line["train_rmse"])
        bar.update(task, advance=1, note=f"RMSE {error:.5g}")

    rows, cols, values = table.rows, table.cols, table.values
    train, valid = parts.train, parts.valid
    return complete(
        rows[train],
        cols[train],
        values[train],
        (len(table.row_ids), len(table.col_ids)),
        args.rank_or_auto,
        solver=args.solver,
        tol=args.tol,
        iters=args.iters,
        ridge=ridge,
        ridge_power=args.ridge_power,
        biases=args.biases,
        holdout=(rows[valid], cols[valid], values[valid]) if len(valid) else 0.0,
        dtype=np.float64 if args.float64 else np.float32,
        key=jax.random.key(args.seed),
        callback=show,
    )
