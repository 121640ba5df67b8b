"""What `uoe complete` does, from a file of entries to factors and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from uoe_jax.complete.fit import Parts, fit, split
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.complete.plot import plot_convergence
from uoe_jax.complete.read import Table, read_entries
from uoe_jax.errors import ConfigError
from uoe_jax.linalg.completion import Factors, predict, save_factors
from uoe_jax.linalg.completion.factors import squared_error_interval


def run_complete(args: CompleteArgs) -> int:
    """Run one completion; returns the exit status 0.

    Raises:
      ConfigError, DataError: one line with the value, the rule and the fix.
    """
    if args.float64:
        jax.config.update("jax_enable_x64", True)
    out = args.out or Path(args.file.stem + "_completed")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder with --out")
    table = read_entries(args.file, args.columns)
    parts = split(table, args.holdout, args.seed)
    console = Console(quiet=args.quiet)
    for line in describe(args.file, table, parts):
        console.print(line, soft_wrap=True)
    factors, ridge = fit(args, table, parts, console)
    console.print(sweeps_table(factors, ridge))
    result = summary(args.file, factors, ridge, parts.repeats)
    if len(parts.test):
        result["heldout"] = held_out_error(factors, table, parts.test)
        error, (low, high) = result["heldout"]["rmse"], result["heldout"]["interval95"]
        console.print(
            f"held-out RMSE {error:.5f} (95% interval {low:.5f} to {high:.5f}, "
            f"{len(parts.test):,} entries that chose nothing)",
            soft_wrap=True,
        )
    out.mkdir(parents=True, exist_ok=True)
    ids = {"row_ids": table.row_ids, "col_ids": table.col_ids}
    save_factors(factors, out / "factors.safetensors", **ids)
    plot_convergence(factors.info, out / "convergence.png")
    (out / "history.json").write_text(json.dumps(result, indent=1))
    console.print(f"{out}: factors.safetensors, convergence.png, history.json")
    return 0


def describe(file: Path, table: Table, parts: Parts) -> list[str]:
    """Return what a file holds and what becomes of it, a line a fact."""
    held = len(parts.valid) + len(parts.test)
    lines = [
        f"{file}: {len(table.values):,} entries ({', '.join(table.names)}) of a "
        f"{len(table.row_ids):,} x {len(table.col_ids):,} matrix, {held:,} held out"
    ]
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


def summary(file: Path, factors: Factors, ridge: float, repeats: int) -> dict[str, Any]:
    """Return the run in plain numbers."""
    info = factors.info
    names = ("train_rmse", "valid_rmse", "steps", "flops")
    return {
        "file": str(file),
        "shape": list(factors.shape),
        "rank": factors.rank,
        "ridge": ridge,
        "num_duplicates": repeats,
        "empty_rows": int(info["empty_rows"].sum()),
        "empty_cols": int(info["empty_cols"].sum()),
        "best_sweep": int(info["best_sweep"]) + 1,
        "sweeps": {name: info[name].tolist() for name in names if name in info},
    }


def held_out_error(factors: Factors, table: Table, test: np.ndarray) -> dict[str, Any]:
    """Return RMSE with its 95% interval and MAE on entries that chose nothing."""
    model = predict(factors, table.rows[test], table.cols[test])
    errors = np.asarray(model) - table.values[test]
    error, low, high = squared_error_interval(errors)
    mae = float(np.abs(errors).mean())
    return {"rmse": error, "interval95": [low, high], "mae": mae, "entries": len(test)}
