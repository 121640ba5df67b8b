"""What `uoe complete` does, from a file of entries to factors and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from uoe_jax.complete.fit import fit, split
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.complete.plot import plot_convergence
from uoe_jax.complete.read import Table, read_entries
from uoe_jax.linalg.completion import Factors, predict, save_factors
from uoe_jax.linalg.completion.factors import squared_error_interval


def run_complete(args: CompleteArgs) -> int:
    """Run one completion; returns the exit status 0.

    Raises:
      ConfigError, DataError: one line with the value, the rule and the fix.
    """
    if args.float64:
        jax.config.update("jax_enable_x64", True)
    table = read_entries(args.file, args.columns)
    parts = split(table, args.holdout, args.seed)
    console = Console(quiet=args.quiet)
    console.print(
        f"{args.file}: {len(table.values):,} entries of a {len(table.row_ids):,} x "
        f"{len(table.col_ids):,} matrix, {len(parts.valid) + len(parts.test):,} held "
        "out",
        soft_wrap=True,
    )
    factors, ridge = fit(args, table, parts, console)
    console.print(sweeps_table(factors, ridge))
    result = summary(args.file, factors, ridge)
    if len(parts.test):
        result["heldout"] = held_out_error(factors, table, parts.test)
        error, (low, high) = result["heldout"]["rmse"], result["heldout"]["interval95"]
        console.print(
            f"held-out RMSE {error:.5f} (95% interval {low:.5f} to {high:.5f}, "
            f"{len(parts.test):,} entries that chose nothing)",
            soft_wrap=True,
        )
    out = args.out or Path(args.file.stem + "_completed")
    out.mkdir(parents=True, exist_ok=True)
    ids = {"row_ids": table.row_ids, "col_ids": table.col_ids}
    save_factors(factors, out / "factors.safetensors", **ids)
    plot_convergence(factors.info, out / "convergence.png")
    (out / "history.json").write_text(json.dumps(result, indent=1))
    console.print(f"{out}: factors.safetensors, convergence.png, history.json")
    return 0


def sweeps_table(factors: Factors, ridge: float) -> RichTable:
    """Return a table with a line a sweep; the kept one has a star."""
    info = factors.info
    shown = RichTable(title=f"rank {factors.rank}, ridge {ridge:.3g}")
    for name in ("sweep", "train RMSE", "held-out RMSE", "iterations", "GFLOP"):
        shown.add_column(name, justify="right")
    for number, error in enumerate(info["train_rmse"]):
        valid = f"{info['valid_rmse'][number]:.5f}" if "valid_rmse" in info else "-"
        mark = "*" if number == info["best_sweep"] else ""
        steps = "/".join(str(s) for s in info["steps"][number])
        flops = info["flops"][number].sum() / 1e9
        shown.add_row(
            f"{mark}{number + 1}", f"{error:.5f}", valid, steps, f"{flops:.3g}"
        )
    return shown


def summary(file: Path, factors: Factors, ridge: float) -> dict[str, Any]:
    """Return the run in plain numbers."""
    info = factors.info
    names = ("train_rmse", "valid_rmse", "steps", "flops")
    return {
        "file": str(file),
        "shape": list(factors.shape),
        "rank": factors.rank,
        "ridge": ridge,
        "num_duplicates": int(info["num_duplicates"]),
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
