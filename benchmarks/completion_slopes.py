"""How the work and the time of a half-step grow with the entries and with the rank.

Entries are regular (every column has the same number), so there is no padding; CG runs
a fixed number of steps. Losses are those after the column half-step: the same data, so
a solver that is fast by being wrong would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from uoe_jax.files import write_atomically
from uoe_jax.linalg.completion import Solver
from uoe_jax.linalg.completion.als import Factor, run_sweep, update_factor
from uoe_jax.linalg.completion.entries import Entries
from uoe_jax.linalg.completion.flops import count_sweep
from uoe_jax.linalg.completion.method import Method, Penalties
from uoe_jax.linalg.completion.problem import State, lay_out
from uoe_jax.report.style import LIGHT, Theme, render

SIZES = {
    "full": {
        "entries": [2_000_000, 10_000_000, 50_000_000, 200_000_000],
        "entries_degree": 500,
        "entries_rank": 64,
        "solvers": ("cg", "exact", "gram"),
        "ranks": [32, 64, 128, 256, 512],
        "ranks_shape": (262_144, 512, 32_768),
    },
    "cpu": {
        "entries": [20_000, 100_000, 500_000, 2_000_000],
        "entries_degree": 100,
        "entries_rank": 32,
        "solvers": ("cg", "exact"),
        "ranks": [32, 64, 128, 256, 512],
        "ranks_shape": (65_536, 8, 32_768),
    },
    "small": {
        "entries": [4_000, 12_000],
        "entries_degree": 20,
        "entries_rank": 4,
        "solvers": ("cg", "exact", "gram"),
        "ranks": [4, 8],
        "ranks_shape": (2048, 16, 512),
    },
}
SOLVERS = {
    "cg": Solver("cg", max_steps=8),
    "exact": Solver("exact"),
    "gram": Solver("gram", max_steps=12, gram_precision="default"),
}
Timer = Callable[[Callable[[], Any]], float]


def regular_entries(m: int, n: int, degree: int) -> Entries:
    """Return a noisy rank-8 matrix's entries, exactly `degree` in every column.

    Column j holds rows (4999 j + offset_t) mod m for distinct offsets: with m = n the
    rows' degrees are equal too, so there is one bucket a side.
    """
    pick = np.random.default_rng(0).permutation(m)[:degree].astype(np.int32)
    cols = jnp.repeat(jnp.arange(n, dtype=jnp.int32), degree)
    first = (jnp.arange(n, dtype=jnp.int32) * 4999) % m
    rows = ((first[:, None] + jnp.asarray(pick)[None, :]) % m).reshape(-1)
    keys = jax.random.split(jax.random.key(0), 3)
    u, v = jax.random.normal(keys[0], (m, 8)), jax.random.normal(keys[1], (n, 8))
    values = jax.jit(lambda u, v, i, j: jnp.sum(u[i] * v[j], 1))(u, v, rows, cols)
    noise = 0.1 * jax.random.normal(keys[2], rows.shape)
    return Entries(rows, cols, values / 8**0.5 + noise, None, (m, n))


def start_of(m: int, n: int, rank: int) -> State:
    """Return a random state of the right shapes."""
    keys = jax.random.split(jax.random.key(5))
    u = jax.random.normal(keys[0], (m, rank)) / m**0.5
    v = jax.random.normal(keys[1], (n, rank))
    return State(u, v, jnp.zeros(m), jnp.zeros(n))


def penalties_of(ridge: float, tol: float = 0.0) -> Penalties:
    """Return a constant ridge in float32."""
    return Penalties(*(jnp.float32(x) for x in (ridge, ridge, 0.0, tol)))


def bench_entries(size: dict, timed: Timer) -> dict[str, Any]:
    """Time a sweep against the number of entries, at one degree and one rank."""
    degree, rank = size["entries_degree"], size["entries_rank"]
    out: dict[str, Any] = {"degree": degree, "rank": rank}
    for count in size["entries"]:
        side = count // degree
        entries = regular_entries(side, side, degree)
        layout = lay_out(entries, rank)
        problem = layout.problem(entries.values, None, jnp.float32(0))
        for name in size["solvers"]:
            solver = SOLVERS[name]
            method = Method(solver, True, False)
            args = (start_of(side, side, rank), penalties_of(1.0), jax.random.key(0))
            sweep = partial(run_sweep, problem, *args, method)
            stats = sweep()[1]
            flops = sum(f.regression for f in count_sweep(layout, method, rank, stats))
            line = [entries.size, timed(sweep), float(stats[1].loss) / entries.size]
            out.setdefault(name, []).append([*line, flops])
        print("entries", count, {n: out[n][-1] for n in size["solvers"]}, flush=True)
    return with_slopes(out)


def bench_ranks(size: dict, timed: Timer) -> dict[str, Any]:
    """Time a column half-step against the rank, at least 64 equations an unknown."""
    m, n, degree = size["ranks_shape"]
    out: dict[str, Any] = {"rows": m, "cols": n, "degree": degree}
    entries = regular_entries(m, n, degree)
    for rank in size["ranks"]:
        layout = lay_out(entries, rank)
        side = layout.problem(entries.values, None, jnp.float32(0)).cols
        u, v, row_bias, col_bias = start_of(m, n, rank)
        rest = (penalties_of(1.0), jax.random.key(0))
        for name in size["solvers"]:
            solver = SOLVERS[name]
            method = Method(solver, True, False)
            step = jax.jit(partial(update_factor, method=method))
            args = (side, Factor(u, row_bias), Factor(v, col_bias), *rest)
            held, new, stats = step(*args)
            after = step(side, held, new, *rest)[2]
            flops = count_sweep(layout, method, rank, (stats, stats))[0].regression
            line = [rank, timed(partial(step, *args))]
            line += [float(after.loss) / entries.size, flops]
            out.setdefault(name, []).append(line)
        print("rank", rank, {n: out[n][-1] for n in size["solvers"]}, flush=True)
    return with_slopes(out)


def with_slopes(out: dict[str, Any]) -> dict[str, Any]:
    """Add the slopes of log seconds and log FLOPs over the log of the size."""
    for name in (name for name in SOLVERS if name in out):
        x, seconds, _, flops = np.log(np.array(out[name], float)).T
        out[name + "_slope"] = float(np.polyfit(x, seconds, 1)[0])
        out[name + "_flops_slope"] = float(np.polyfit(x, flops, 1)[0])
        print(
            f"{name}: time slope {out[name + '_slope']:.3f}, "
            f"counted FLOPs slope {out[name + '_flops_slope']:.3f}",
            flush=True,
        )
    return out


def plot_slopes(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: for each device time by entries, by rank; counted FLOPs; losses."""
    devices: dict[str, dict] = {}
    for report in reports:
        devices.setdefault(report.get("device", "one CPU thread"), {}).update(report)
    panels = (
        ("entries", 1, "seconds of a sweep"),
        ("ranks", 1, "seconds of a half-step"),
        ("ranks", 3, "FLOPs counted"),
        ("ranks", 2, "loss after the half-step"),
    )

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(13, 3.1 * len(devices)), layout="constrained")
        grid = figure.subplots(len(devices), 4, squeeze=False)
        for axes, (device, report) in zip(grid, devices.items(), strict=True):
            for axis, (section, column, label) in zip(axes, panels, strict=True):
                axis.set_xscale("log")
                if column != 2:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}")
                axis.tick_params(labelsize=8)
                plot_panel(axis, report.get(section, {}), column, theme)
                axis.set_xlabel("entries" if section == "entries" else "rank")
                axis.set_ylabel(label)
                axis.set_title(device, fontsize=9)
        return figure

    write_atomically(path, render(draw, (LIGHT,), dpi=130)["light"])


def plot_panel(axis: Any, part: dict[str, Any], column: int, theme: Theme) -> None:
    """Draw one column of a section for every solver that ran; legend with slopes."""
    kind = {1: "_slope", 3: "_flops_slope"}.get(column)
    looks = {"gram": "^--", "exact": "s-", "cg": "o:"}
    for (name, mark), color in zip(looks.items(), theme.colors, strict=False):
        if name in part:
            points = np.array(part[name], float)
            note = f", slope {part[name + kind]:.2f}" if kind else ""
            x, y = points[:, 0], points[:, column]
            axis.plot(x, y, mark, color=color, label=name + note)
            labels = [f"{n:.0f}" if n < 1e4 else f"{n:.0e}" for n in x]
            axis.set_xticks(x, labels=labels)
            axis.minorticks_off()
    if part:
        axis.legend(fontsize=8)
