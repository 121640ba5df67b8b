"""The fit of `uoe complete`: entries held out, a ridge chosen, progress shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from uoe_jax.complete.options import CompleteArgs
from uoe_jax.data.entries import Table
from uoe_jax.errors import ConfigError
from uoe_jax.linalg.completion.choose import (
    Chosen,
    Listener,
    Ratings,
    choose,
    draw_positions,
    fit_again,
)
from uoe_jax.linalg.completion.defaults import default_rank
from uoe_jax.linalg.completion.factors import Factors


class EntrySplit(NamedTuple):
    """Which entries train, choose and report; and how many repeat a position."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    repeats: int


def split(table: Table, holdout: float, seed: int) -> EntrySplit:
    """Return a random split; half of the held-out positions choose, half report."""
    place, order = draw_positions(table.rows, table.cols, len(table.col_ids), seed)
    size = len(order)
    count = round(holdout * size)
    if holdout and not 2 <= count < size:
        raise ConfigError(
            f"holdout is {holdout} of {size} entries; it must leave at least 2 held "
            "out and 1 to train on, or be 0"
        )
    part = np.zeros(size, np.int8)
    part[order[: count // 2]] = 1
    part[order[count // 2 : count]] = 2
    train, valid, test = (np.flatnonzero(part[place] == number) for number in range(3))
    return EntrySplit(train, valid, test, len(place) - size)


def fit(
    args: CompleteArgs, table: Table, parts: EntrySplit, console: Console
) -> tuple[Chosen, Factors]:
    """Return the fit that held-out entries chose, and the one of all entries."""
    shape = (len(table.row_ids), len(table.col_ids))
    ratings = Ratings(table.rows, table.cols, table.values, shape)
    held = ratings.take(parts.valid) if len(parts.valid) else None
    rank = default_rank(shape) if args.rank is None else args.rank
    rank = int(rank) if rank != "auto" else "auto"
    key, dtype = jax.random.key(args.seed), np.float64 if args.float64 else np.float32
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=args.quiet or not console.is_terminal,
        transient=True,
    )

    def begin(ridge: float) -> Callable[[dict], None]:
        task = bar.add_task(f"ridge {ridge:.3g}", total=args.iters, note="")

        def show(line: dict) -> None:
            error = line.get("valid_rmse", line["train_rmse"])
            bar.update(task, advance=1, note=f"RMSE {error:.5g}")

        return show

    def tell(ridge: float, error: float) -> None:
        console.print(f"ridge {ridge:.3g}: RMSE {error:.5f} where it chooses")

    with bar:
        train = ratings.take(parts.train)
        listener = Listener(begin, tell)
        chosen = choose(train, held, rank, args, key, dtype=dtype, listener=listener)
        factors = chosen.factors
        if args.refit and held is not None:
            console.print("fitting all entries by that ridge and number of sweeps")
            factors = fit_again(ratings, chosen, args, key, dtype)
    return chosen, factors
