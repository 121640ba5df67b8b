"""What `uoe complete` does, from a file of entries to factors and a plot."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from uoe_jax.appearing import appearing_together
from uoe_jax.complete.fit import EntrySplit, fit, split
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.complete.plot import plot_convergence
from uoe_jax.complete.predictions import (
    Completion,
    load_completion,
    save_completion,
    write_predictions,
)
from uoe_jax.data.entries import Pairs, Table, read_entries, read_pairs
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.escape import escape_line
from uoe_jax.files import format_json, write_atomically
from uoe_jax.linalg.completion.choose import Chosen
from uoe_jax.linalg.completion.factors import Factors, predict, squared_error_interval


def run_complete(args: CompleteArgs) -> int:
    """Run one completion, or predict from an earlier one; returns the exit status 0.

    Raises:
      ConfigError, DataError: one line with the value, the rule and the fix.
    """
    if args.float64:
        jax.config.update("jax_enable_x64", True)
    console = Console(quiet=args.quiet, markup=False, emoji=False)
    if args.file.is_dir() or args.file.suffix == ".safetensors":
        return predict_again(args, console)
    out = args.out or Path(stem_of(args.file) + "_completed")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder with --out")
    table = read_entries(
        args.file, args.columns, delimiter=args.delimiter, decimal=args.decimal
    )
    pairs = _pairs(args, None, table.row_ids, table.col_ids, table.names)
    parts = split(table, args.holdout, args.seed)
    for line in describe(args.file, table, parts):
        console.print(escape_line(line), soft_wrap=True)
    chosen, factors = fit(args, table, parts, console)
    console.print(sweeps_table(chosen.factors, chosen.ridge))
    result = summary(args.file, chosen, parts.repeats, factors is not chosen.factors)
    if len(parts.test):
        result["heldout"] = held_out_error(chosen.factors, table, parts.test)
        error, (low, high) = result["heldout"]["rmse"], result["heldout"]["interval95"]
        sure = f"95% interval {low:.5f} to {high:.5f}, {len(parts.test):,} entries"
        if math.isinf(high):
            sure = "too few for an interval, 1 entry"
        console.print(
            f"held-out RMSE {error:.5f} ({sure} that chose nothing)", soft_wrap=True
        )
    completion = Completion(factors, table.row_ids, table.col_ids, table.names)
    with appearing_together(out) as unfinished:
        save_completion(completion, unfinished / "factors.safetensors")
        plot_convergence(chosen.factors.info, unfinished / "convergence.png")
        write_atomically(unfinished / "history.json", format_json(result, indent=1))
    written = "factors.safetensors, convergence.png, history.json"
    console.print(escape_line(f"{out}: {written}"), soft_wrap=True)
    if pairs is not None:
        _predict(completion, pairs, out, console)
    return 0


def predict_again(args: CompleteArgs, console: Console) -> int:
    """Predict the pairs of `args.predict` from factors that an earlier run wrote."""
    completion = load_completion(args.file)
    if args.predict is None:
        raise ConfigError(
            f"{args.file} is a completion; say what it is to predict: --predict FILE"
        )
    used = ("file", "predict", "columns", "delimiter", "out", "quiet")
    for field in dataclasses.fields(args):
        if field.name not in used and getattr(args, field.name) != field.default:
            raise ConfigError(
                f"{args.file} is a completion, which fits nothing; leave out "
                f"--{field.name.replace('_', '-')}"
            )
    out = args.out or (args.file if args.file.is_dir() else args.file.parent)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder with --out")
    pairs = _pairs(args, args.columns, *completion[1:])
    if pairs is not None:
        out.mkdir(parents=True, exist_ok=True)
        _predict(completion, pairs, out, console)
    return 0


def _pairs(
    args: CompleteArgs,
    columns: str | None,
    row_ids: np.ndarray,
    col_ids: np.ndarray,
    names: tuple[str, ...],
) -> Pairs | None:
    """Return what is to be predicted, if anything; read before a fit takes its time."""
    if args.predict is None:
        return None
    given = (args.predict, row_ids, col_ids, names, columns)
    try:
        return read_pairs(*given, delimiter=args.delimiter)
    except DataError:
        if args.delimiter is None:
            raise
    return read_pairs(*given)  # the entries' delimiter needn't be that of the pairs


def _predict(completion: Completion, pairs: Pairs, out: Path, console: Console) -> None:
    new = write_predictions(completion, pairs, out / "predictions.csv")
    line = f"{out}: predictions.csv, {len(pairs.rows):,} pairs"
    if new:
        line += f", {new:,} of them with an id that the fit never saw"
    console.print(escape_line(line), soft_wrap=True)


def stem_of(file: Path) -> str:
    """Return a file's name without its endings, `ratings` of ratings.csv.gz."""
    packed = file.suffix.lower() in (".gz", ".bz2", ".xz", ".zip")
    return Path(file.stem).stem if packed else file.stem


def describe(file: Path, table: Table, parts: EntrySplit) -> list[str]:
    """Return what a file holds and what becomes of it, a line a fact."""
    held = len(parts.valid) + len(parts.test)
    lines = [
        f"{file}: {len(table.values):,} entries ({', '.join(table.names)}) of a "
        f"{len(table.row_ids):,} x {len(table.col_ids):,} matrix, {held:,} held out"
    ]
    if table.notes:
        lines.append(f"read with: {', '.join(table.notes)}")
    if parts.repeats:
        lines.append(f"{parts.repeats:,} entries repeat a position; averaged")
    sides = ((table.rows, table.row_ids, "row"), (table.cols, table.col_ids, "column"))
    for index, ids, name in sides:
        empty = len(ids) - len(np.unique(index[parts.train]))
        if empty:
            lines.append(f"{empty:,} {name}s have no entry to train on; factors zero")
    return lines


def sweeps_table(factors: Factors, ridge: float) -> RichTable:
    """Return a table with a line a sweep; the kept one has a star."""
    info = factors.info
    shown = RichTable(title=f"rank {factors.rank}, ridge {ridge:.3g}")
    for name in ("sweep", "train RMSE", "validation RMSE", "iterations", "GFLOP"):
        shown.add_column(name, justify="right")
    for number, error in enumerate(info["train_rmse"]):
        valid = f"{info['valid_rmse'][number]:.5f}" if "valid_rmse" in info else "-"
        mark = "*" if number == info["best_sweep"] else ""
        taken = info["steps"][number]
        steps = "/".join(map(str, taken)) if any(taken) else "-"  # solved directly
        flops = info["flops"][number].sum() / 1e9
        shown.add_row(
            f"{mark}{number + 1}", f"{error:.5f}", valid, steps, f"{flops:.3g}"
        )
    return shown


def summary(file: Path, chosen: Chosen, repeats: int, refitted: bool) -> dict[str, Any]:
    """Return the run in plain numbers."""
    factors, info = chosen.factors, chosen.factors.info
    names = ("train_rmse", "valid_rmse", "steps", "flops")
    return {
        "file": str(file),
        "shape": list(factors.shape),
        "rank": factors.rank,
        "ridge": chosen.ridge,
        "num_duplicates": repeats,
        "empty_rows": int(info["empty_rows"].sum()),
        "empty_cols": int(info["empty_cols"].sum()),
        "best_sweep": chosen.sweeps,
        "refitted": refitted,
        "sweeps": {name: info[name].tolist() for name in names if name in info},
    }


def held_out_error(factors: Factors, table: Table, test: np.ndarray) -> dict[str, Any]:
    """Return RMSE with its 95% interval and MAE on entries that chose nothing."""
    model = predict(factors, table.rows[test], table.cols[test])
    errors = np.asarray(model) - table.values[test]
    error, low, high = squared_error_interval(errors)
    mae = float(np.abs(errors).mean())
    return {"rmse": error, "interval95": [low, high], "mae": mae, "entries": len(test)}
