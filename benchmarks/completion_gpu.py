"""Completion on one accelerator: sweep time, memory, time to accuracy.

Every section prints its numbers and rewrites the JSON, so a run that is cut short
keeps what it has. A section starts only while the time budget lasts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from completion_slopes import SIZES as SLOPE_SIZES
from completion_slopes import bench_entries, bench_ranks, penalties_of

from uoe_jax.bench.record import header, write_record
from uoe_jax.bench.timing import round_seconds
from uoe_jax.linalg.completion import Solver
from uoe_jax.linalg.completion.als import run_sweep, start_state
from uoe_jax.linalg.completion.entries import Entries
from uoe_jax.linalg.completion.factors import predict_entries
from uoe_jax.linalg.completion.method import Method, Penalties
from uoe_jax.linalg.completion.problem import lay_out
from uoe_jax.linalg.completion.spectral import Start

TARGET = 1e-4  # error of unseen entries over their size
SIZES = {
    "full": {
        "sweep": (1_000_000, 100_000, 100_000_000, 64),
        "planted": [
            ("1e5 x 1e5, 1e8 entries, rank 64", 100_000, 100_000, 100_000_000, 64),
            ("1e6 x 1e5, 1e8 entries, rank 10", 1_000_000, 100_000, 100_000_000, 10),
        ],
    },
    "small": {
        "sweep": (3000, 400, 60_000, 8),
        "planted": [("1000 x 800, 1e5 entries, rank 5", 1000, 800, 100_000, 5)],
    },
}


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median seconds of `run`, compiled and warm."""
    jax.block_until_ready(run())
    return statistics.median(round_seconds(run, repeats))


def peak_gib() -> float | None:
    """Return the process's peak of device memory so far, in GiB."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def random_entries(
    m: int, n: int, count: int, rank: int, noise: float, seed: int = 0
) -> tuple[Entries, tuple]:
    """Return about `count` distinct entries of a planted matrix, and its factors.

    All on the device: positions are uniform, repeats are dropped.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    u = jax.random.normal(keys[0], (m, rank)) / rank**0.5
    v = jax.random.normal(keys[1], (n, rank))
    rows = jax.random.randint(keys[2], (count,), 0, m)
    cols = jax.random.randint(keys[3], (count,), 0, n)
    rows, cols = jax.lax.sort((rows, cols), num_keys=2)
    fresh = (rows[1:] != rows[:-1]) | (cols[1:] != cols[:-1])
    keep = jnp.nonzero(jnp.concatenate([jnp.ones(1, bool), fresh]))[0]
    rows, cols = rows[keep], cols[keep]
    values = planted_values(u, v, rows, cols)
    values = values + noise * jax.random.normal(keys[4], values.shape)
    return Entries(rows, cols, values, None, (m, n)), (u, v)


@jax.jit
def planted_values(u: Any, v: Any, rows: Any, cols: Any) -> Any:
    """Return u v^T at (rows, cols) without holding all gathered rows."""
    return jax.lax.map(
        lambda at: jnp.sum(u[at[0]] * v[at[1]]), (rows, cols), batch_size=1 << 20
    )


SWEEPS = {  # each with the megabytes of gathered rows that a step holds
    "gram_tf32": (Solver("gram", max_steps=12, gram_precision="default"), 512),
    "cg_4_steps_bf16": (Solver("cg", max_steps=4, low_precision=True), 512),
    "exact_tf32": (Solver("exact", gram_precision="default"), 512),
    "cg_4_steps": (Solver("cg", max_steps=4), 512),
    "gram_tf32_128M": (Solver("gram", max_steps=12, gram_precision="default"), 128),
    "gram_bf16": (Solver("gram", max_steps=12, low_precision=True), 2048),
    "exact_fp32": (Solver("exact"), 2048),
}


def bench_sweep(size: dict, report: dict, save: Callable[[], None]) -> None:
    """Time one full sweep of the large problem with each way to solve it."""
    m, n, count, rank = size["sweep"]
    out = report.setdefault("sweep", {"shape": [m, n], "rank": rank})
    start = time.perf_counter()
    entries, _ = random_entries(m, n, count, rank, noise=0.1)
    jax.block_until_ready(entries.values)
    out["entries"] = entries.size
    out["generate_s"] = time.perf_counter() - start
    problem, state, block = None, None, 0
    key, ridge = jax.random.key(0), penalties_of(0.05, 1e-2)
    for name, (solver, megabytes) in SWEEPS.items():
        if megabytes != block:
            del problem
            start, block = time.perf_counter(), megabytes
            layout = lay_out(entries, rank, block_bytes=megabytes << 20)
            problem = layout.problem(entries.values, None, jnp.float32(0))
            jax.block_until_ready(problem)
            spent = time.perf_counter() - start
            shapes = [list(b.index.shape) for b in (*layout.cols, *layout.rows)]
            del layout
            out[f"layout_{megabytes}M"] = {"seconds": spent, "shapes": shapes}
            print(f"layout {megabytes}M: {spent:.2f} s, {shapes}, {peak_gib()} GiB")
        if state is None:
            method = Method(solver, True, False)
            begin = partial(start_state, problem, key, method, Start(rank, passes=3))
            state, _ = begin()
            out["start_s"] = timed(begin, 1)
            print(f"spectral start {out['start_s']:.3f} s, peak {peak_gib()} GiB")
        try:
            out[name] = time_sweep(problem, state, ridge, solver, out["entries"])
            print(f"  {name}: {out[name]}", flush=True)
        except Exception as error:
            print(f"  {name} FAILED: {str(error)[:300]}", flush=True)
        save()


def time_sweep(
    problem: Any, state: Any, penalties: Penalties, solver: Solver, size: int
) -> dict:
    """Return seconds of a sweep, and how fast four of them lower the loss."""
    method, key = Method(solver, True, False), jax.random.key(0)
    cold = time.perf_counter()
    seconds = timed(partial(run_sweep, problem, state, penalties, key, method))
    cold = time.perf_counter() - cold
    losses, steps = [], []
    for _ in range(4):
        state, stats = run_sweep(problem, state, penalties, key, method)
        losses += [float(s.loss) / size for s in stats]
        steps.append([int(s.max_steps) for s in stats])
    result = {"sweep_s": round(seconds, 5), "with_compile_s": round(cold, 2)}
    return result | {"losses": losses, "steps": steps, "peak_gib": peak_gib()}


def bench_planted(size: dict, report: dict, save: Callable[[], None]) -> None:
    """Time until unseen entries of a planted matrix are right to 1e-4."""
    out = report.setdefault("planted", {})
    for name, m, n, count, rank in size["planted"]:
        entries, (u, v) = random_entries(m, n, count, rank, noise=0.0)
        keys = jax.random.split(jax.random.key(9), 2)
        rows = jax.random.randint(keys[0], (1_000_000,), 0, m)
        cols = jax.random.randint(keys[1], (1_000_000,), 0, n)
        truth = planted_values(u, v, rows, cols)
        scale = float(jnp.sqrt(jnp.mean(truth * truth)))
        for kind in ("gram", "cg"):
            solver = Solver(kind, max_steps=20, gram_precision="default")
            out[f"{name}, {kind}"] = result = reach(
                entries, solver, rank, (rows, cols), truth, scale
            )
            print(f"planted {name}, {kind}: {result}", flush=True)
            save()


def reach(
    entries: Entries, solver: Solver, rank: int, where: tuple, truth: Any, scale: float
) -> dict:
    """Return seconds until the error is TARGET, first call cold, then compiled."""
    zeros = tuple(jnp.zeros(size, jnp.float32) for size in entries.shape)
    result: dict[str, Any] = {}
    args = (entries.rows, entries.cols, entries.values)
    layout = lay_out(entries, rank)
    for label in ("cold", "warm"):
        begin = time.perf_counter()
        problem = layout.problem(args[2], None, jnp.float32(0))
        method = Method(solver, False, False)
        key = jax.random.key(0)
        state, _ = start_state(problem, key, method, Start(rank))
        errors, seconds = [], []
        for _ in range(30):
            state, _ = run_sweep(problem, state, penalties_of(0.0, 1e-5), key, method)
            model = predict_entries(state.u, state.v, *zeros, jnp.float32(0), *where)
            error = float(jnp.sqrt(jnp.mean((model - truth) ** 2))) / scale
            errors.append(error)
            seconds.append(time.perf_counter() - begin)
            if error <= TARGET or not np.isfinite(error):
                break
        result[label + "_s"] = seconds[-1] if errors[-1] <= TARGET else None
        result["sweeps"], result["error"] = len(errors), errors[-1]
        result["errors"], result["seconds"] = errors, seconds
    return result


def run_suite(args: argparse.Namespace) -> None:
    """Run the sections that fit into the budget; write after each of their parts."""
    began = time.perf_counter()
    kind = "small" if args.small else "full"
    size = SIZES[kind]
    report: dict[str, Any] = header(stated=args.commit)
    save = lambda: write_record(args.out, report)
    sections = {
        "sweep": lambda: bench_sweep(size, report, save),
        "planted": lambda: bench_planted(size, report, save),
        "ranks": lambda: report.update(ranks=bench_ranks(SLOPE_SIZES[kind], timed)),
        "entries": lambda: report.update(
            entries=bench_entries(SLOPE_SIZES[kind], timed)
        ),
    }
    for name, section in sections.items():
        spent = time.perf_counter() - began
        if args.only and name not in args.only:
            continue
        if spent > args.budget:
            print(f"{name}: left out, {spent:.0f} s spent of {args.budget:.0f}")
            continue
        try:
            section()
        except Exception as error:
            report[name + "_error"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name} FAILED: {error}"[:1500], flush=True)
        report[name + "_section_s"] = time.perf_counter() - began - spent
        report["peak_gib"] = peak_gib()
        save()
        print(f"[{time.perf_counter() - began:.0f} s] {name} done", flush=True)
