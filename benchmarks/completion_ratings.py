"""Accuracy on real ratings: MovieLens 100K's official fold 1, and Jester.

Hyperparameters are chosen on a tenth of the training entries; the test entries are
looked at once, by the model that was refitted to all training entries.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.linalg.completion import Factors, complete, predict
from uoe_jax.linalg.completion.factors import squared_error_interval


class Ratings(NamedTuple):
    """Entries of a rating matrix, which of them are the test's, and the scale."""

    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    test: np.ndarray  # mask
    low: float
    high: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return int(self.rows.max()) + 1, int(self.cols.max()) + 1

    def part(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, columns and values of some entries."""
        return self.rows[where], self.cols[where], self.values[where]


def movielens(path: Path) -> Ratings:
    """Return MovieLens 100K with the official fold u1 as the test."""
    data = np.load(path)
    rows, cols = data["user"].astype(int) - 1, data["item"].astype(int) - 1
    values = data["rating"].astype(np.float32)
    return Ratings(rows, cols, values, data["fold"] == 1, 1.0, 5.0)


def jester(path: Path) -> Ratings:
    """Return Jester 1 with two ratings of each user held out (Goldberg et al. 2001)."""
    grid = np.load(path)["x100"]
    rows, cols = np.nonzero(grid != -32768)
    values = (grid[rows, cols] / 100).astype(np.float32)
    draw = np.random.default_rng(0).random(len(rows))
    order = np.lexsort((draw, rows))
    place = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    test = np.zeros(len(rows), bool)
    test[order[place < 2]] = True
    return Ratings(rows, cols, values, test, -10.0, 10.0)


def choose(data: Ratings, points: list[dict], iters: int) -> tuple[dict, list]:
    """Return the best of some options, and what each gave on validation entries."""
    train = np.random.default_rng(1).permutation(np.flatnonzero(~data.test))
    held, fit = train[: len(train) // 10], np.sort(train[len(train) // 10 :])
    tried = []
    for options in points:
        how = {"iters": iters, "tol": 1e-5, "patience": 5, "biases": True, **options}
        held_out = data.part(held)
        factors = complete(*data.part(fit), data.shape, holdout=held_out, **how)
        sweeps = {"iters": int(factors.info["best_sweep"]) + 1}
        tried.append((options | sweeps, errors(factors, data, held)))
        print("  ", *tried[-1], flush=True)
    return min(tried, key=lambda line: line[1]["rmse"])[0], tried


def grid(**choices: list) -> list[dict[str, Any]]:
    """Return every combination of choices."""
    return [dict(zip(choices, x, strict=True)) for x in product(*choices.values())]


def errors(factors: Factors, data: Ratings, where: np.ndarray) -> dict[str, Any]:
    """Return RMSE with its 95% interval and NMAE, predictions clipped to the scale."""
    rows, cols, values = data.part(where)
    model = np.clip(np.asarray(predict(factors, rows, cols)), data.low, data.high)
    rmse, low, high = squared_error_interval(model - values)
    mae = float(np.abs(model - values).mean())
    return {
        "rmse": round(rmse, 5),
        "interval95": [round(low, 5), round(high, 5)],
        "mae": round(mae, 5),
        "nmae": round(mae / (data.high - data.low), 5),
    }


def evaluate(data: Ratings, points: list[dict], iters: int) -> dict[str, Any]:
    """Choose on validation entries, fit all of training, test once."""
    begin = time.perf_counter()
    best, tried = choose(data, points, iters)
    train, test = np.flatnonzero(~data.test), np.flatnonzero(data.test)
    factors = complete(*data.part(train), data.shape, tol=0, biases=True, **best)
    result = {"chosen": best, "test": errors(factors, data, test), "tried": tried}
    result |= {"train_entries": len(train), "test_entries": len(test)}
    result["seconds"] = round(time.perf_counter() - begin, 1)
    print(result["chosen"], result["test"], f"{result['seconds']} s", flush=True)
    return result


def bench_ratings(movielens_path: Path | None, jester_path: Path | None) -> dict:
    """Return the accuracy on each data set that was given."""
    report = {}
    if movielens_path is not None:
        rank = {"rank": [8, 12], "solver": ["exact"]}
        points = grid(
            ridge_power=[0.5], ridge=[1.0, 1.3, 1.5], bias_ridge=[0.2, 0.5], **rank
        ) + grid(ridge_power=[0.0], ridge=[10.0, 14.0], bias_ridge=[2.0, 4.0], **rank)
        points.sort(key=lambda point: point["rank"])  # one compilation for each rank
        report["movielens_u1"] = evaluate(movielens(movielens_path), points, 40)
    if jester_path is not None:
        points = grid(
            rank=[10], ridge_power=[0.5], ridge=[8.0, 16.0, 30.0], bias_ridge=[3.0]
        )
        report["jester"] = evaluate(jester(jester_path), points, 30)
    return report
