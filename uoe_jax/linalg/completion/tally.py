"""FLOPs of a sweep that was run: its layout and iterations, counted."""

from __future__ import annotations

from uoe_jax.linalg.completion.count import Flops, count_gauge, count_half_step
from uoe_jax.linalg.completion.half import Stats
from uoe_jax.linalg.completion.problem import Layout
from uoe_jax.linalg.completion.run import Method


def count_sweep(
    layout: Layout, method: Method, rank: int, stats: tuple[Stats, Stats]
) -> tuple[Flops, Flops]:
    """Return the FLOPs of the column and the row half-step that `stats` describe."""
    m, n = layout.shape
    width = rank + method.biases
    cols, rows = layout.counts
    return (
        _count_side(cols, m, width, method, stats[0]),
        _count_side(rows, n, width, method, stats[1]),
    )


def _count_side(
    counts: list[tuple[int, int, int]],
    fixed: int,
    rank: int,
    method: Method,
    stats: Stats,
) -> Flops:
    parts: dict[str, list[int]] = {}
    for width, entries, known in counts:
        kind = method.solver.choose(width, rank) if width else "cg"
        part = parts.setdefault(kind, [0, 0])
        part[0] += entries
        part[1] += known
    total = Flops(0.0, 0.0, 0.0, 0.0, 0.0)
    for kind, (entries, known) in parts.items():
        steps = 0.0 if kind == "exact" else 1.0
        flops = count_half_step(
            kind,
            entries,
            known,
            rank,
            entry_steps=steps * float(stats.entry_steps),
            unknown_steps=steps * float(stats.unknown_steps),
            sketch_factor=method.solver.sketch_factor,
        )
        total = Flops(*(a + b for a, b in zip(total, flops, strict=True)))
    unknowns = sum(known for _, _, known in counts)
    return total._replace(
        gauge=count_gauge(fixed, unknowns, rank, regularised=method.regularised)
    )
