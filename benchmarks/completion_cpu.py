"""Completion against installed peers on one CPU thread: seconds to the same error.

Times are CPU seconds of the process (a shared machine's wall clock would measure the
neighbours), data preparation included. Peers that aren't installed are left out.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from completion_peers import (
    Trace,
    Triple,
    implicit_sweep,
    libmf_epoch,
    numpy_als,
    soft_impute,
    surprise_svd,
)
from completion_ratings import bench_ratings
from completion_ratings import movielens as read_movielens
from completion_slopes import SIZES, bench_entries, bench_ranks

from uoe_jax.bench.record import header, write_record
from uoe_jax.bench.timing import round_seconds
from uoe_jax.linalg.completion import Solver, complete


def planted(
    m: int, n: int, rank: int, fraction: float, noise: float = 0.0
) -> tuple[Triple, Triple, tuple[int, int]]:
    """Return observed entries, unseen entries and the shape; unit mean square."""
    draw = np.random.default_rng(0)
    u, v = draw.normal(size=(m, rank)) / rank**0.5, draw.normal(size=(n, rank))
    count = int(m * n * fraction)
    flat = draw.permutation(np.unique(draw.integers(0, m * n, 2 * count + 20_000)))
    parts = []
    for part in (flat[:count], flat[count : count + 20_000]):
        rows, cols = np.divmod(part, n)
        parts.append((rows, cols, np.einsum("er,er->e", u[rows], v[cols])))
    rows, cols, values = parts[0]
    values = values + noise * draw.normal(size=count)
    return (rows, cols, values.astype(np.float32)), parts[1], (m, n)


def ours(
    train: Triple, test: Triple, shape: tuple, rank: int, ridge: float, **options: Any
) -> Trace:
    """Sweep until the iteration limit; our held-out checks are charged too."""
    begin, lines = time.process_time(), []

    def note(line: dict) -> None:
        lines.append((time.process_time() - begin, line["valid_rmse"]))

    how = {"holdout": test, "patience": 100, "callback": note, **options}
    complete(*train, shape, rank, ridge=ridge, **how)
    yield from lines


def our_sweep(train: Triple, shape: tuple, rank: int, solver: Solver) -> float:
    """Return the seconds of one of our sweeps, compiled and started."""
    times: list[float] = []
    note = lambda line: times.append(time.process_time())
    how: dict[str, Any] = {"solver": solver, "ridge": 0.01, "tol": 1e-9, "iters": 6}
    complete(*train, shape, rank, passes=1, callback=note, **how)
    return float(np.median(np.diff(times)))


def reach(trace: Trace, target: float) -> dict[str, Any]:
    """Return when a trace first met the target, and the best it got to."""
    best, points = np.inf, []
    for seconds, error in trace:
        points.append([seconds, error])
        best = min(best, error)
        if error <= target:
            return {"seconds": seconds, "error": error, "points": points}
    return {"seconds": None, "error": best, "points": points}


def run_solvers(
    solvers: dict[str, Callable[[], Trace]], target: float, report: dict
) -> dict:
    """Run every solver to the target; print and keep what came of it."""
    report["target"] = target
    for name, run in solvers.items():
        try:
            report[name] = result = reach(run(), target)
        except ImportError as error:
            print(f"  {name}: not installed ({error})")
            continue
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        spent = result["seconds"]
        shown = "never" if spent is None else f"{spent:.2f} s"
        print(f"  {name:32s} {shown:>9s}  RMSE {result['error']:.4g}", flush=True)
    return report


def twice(mine: Callable[..., Trace]) -> dict[str, Callable[[], Trace]]:
    """Return our two solvers, each with its compilation and again without."""
    return {
        f"uoe_jax {solver}{call}": partial(mine, solver=solver)
        for solver in ("exact", "cg")
        for call in (", first call", "")
    }


def bench_planted() -> dict:
    """1500 x 1200, rank 10, 15% seen, no noise: seconds to an error of 1e-3."""
    train, test, shape = planted(1500, 1200, 10, 0.15)
    base = dict(train=train, test=test, shape=shape, rank=10)
    report: dict[str, Any] = {"shape": shape, "entries": len(train[0]), "rank": 10}
    mine = partial(ours, **base, ridge=0.0, tol=1e-5, iters=30)
    solvers = twice(mine) | {
        "numpy ALS": partial(numpy_als, **base, ridge=1e-3, power=0.0),
        "fancyimpute SoftImpute": partial(soft_impute, **base, ridge=0.5),
    }
    return run_solvers(solvers, 1e-3, report)


def bench_movielens(path: Path) -> dict:
    """MovieLens 100K, fold 1: seconds to a test RMSE of 0.94."""
    data = read_movielens(path)
    train, test = data.part(~data.test), data.part(data.test)
    base = dict(train=train, test=test, shape=data.shape, rank=8)
    report: dict[str, Any] = {"shape": data.shape, "entries": len(train[0]), "rank": 8}
    ridges = {"ridge": 1.3, "bias_ridge": 0.5, "ridge_power": 0.5, "biases": True}
    mine = partial(ours, **base, **ridges, tol=1e-3, iters=30)
    solvers = twice(mine) | {
        "numpy ALS": partial(numpy_als, **base, ridge=1.5, power=0.5),
        "scikit-surprise SVD": partial(surprise_svd, train, test, 8, 0.05),
        "fancyimpute SoftImpute": partial(soft_impute, **base, ridge=20.0),
    }
    return run_solvers(solvers, 0.94, report)


def bench_sweep() -> dict:
    """20000 x 5000, 1e6 entries, rank 64: seconds of one pass over the data."""
    train, _, shape = planted(20_000, 5_000, 16, 0.01, noise=0.1)
    report: dict[str, Any] = {"shape": shape, "entries": len(train[0]), "rank": 64}
    mine = partial(our_sweep, train, shape, 64)
    runs = {
        "uoe_jax cg, 3 steps": partial(mine, Solver("cg", max_steps=3)),
        "uoe_jax exact": partial(mine, Solver("exact")),
        "uoe_jax gram, 6 steps": partial(mine, Solver("gram", max_steps=6)),
        "implicit ALS (3 CG steps, implicit feedback)": partial(
            implicit_sweep, train, shape, 64
        ),
        "LIBMF epoch (SGD)": partial(libmf_epoch, train, 64),
    }
    for name, run in runs.items():
        try:
            report[name] = run()
            print(f"  {name:46s} {report[name]:.3f} s", flush=True)
        except ImportError as error:
            print(f"  {name}: not installed ({error})")
    return report


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Return the least CPU seconds of three runs, compiled and warm."""
    jax.block_until_ready(run())
    return min(round_seconds(run, 3, clock=time.process_time))


def run_cpu(args: argparse.Namespace) -> None:
    """Run the comparisons; write after each."""
    report: dict[str, Any] = {"threads": 1, **header(stated=args.commit)}
    sections: dict[str, Callable[[], dict]] = {
        "planted": bench_planted,
        "sweep": bench_sweep,
        "ratings": partial(bench_ratings, args.movielens, args.jester),
        "ranks": partial(bench_ranks, SIZES["cpu"], cpu_seconds),
        "entries": partial(bench_entries, SIZES["cpu"], cpu_seconds),
    }
    if args.movielens is not None:
        sections["movielens"] = partial(bench_movielens, args.movielens)
    for name, bench in sections.items():
        if not args.only or name in args.only:
            print(name, flush=True)
            report[name] = bench()
            write_record(args.out, report)
