"""FLOPs of half-steps and sweeps: counted from what was executed, not from a clock."""

from __future__ import annotations

from typing import NamedTuple

from uoe_jax.linalg.completion.method import Method, Stats
from uoe_jax.linalg.completion.problem import EntryLayout


class Flops(NamedTuple):
    """Multiplications plus additions of one half-step, by part."""

    products: float  # residual, right-hand side and iterations: O(entries x rank)
    gram: float  # normal equations: O(entries x rank^2)
    factorisation: float  # Cholesky or QR: O(unknowns x rank^3)
    vectors: float  # updates of the unknowns' vectors
    gauge: float  # orthonormal basis of the fixed factor

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self)

    @property
    def regression(self) -> float:
        """All parts but the change of basis, the paper's O(entries x rank) term."""
        return self.total - self.gauge


def count_half_step(
    kind: str,
    entries: int,
    unknowns: int,
    rank: int,
    *,
    entry_steps: float = 0.0,
    unknown_steps: float = 0.0,
    sketch_factor: int = 4,
) -> Flops:
    """Return the FLOPs of a half-step's regression; padding isn't counted.

    Args:
      kind: "exact", "gram", "cg" or "sketch".
      entries: observed entries.
      unknowns: unknown vectors with at least one entry.
      rank: width of both factors (one more with biases).
      entry_steps: iterations of each problem times its entries, summed.
      unknown_steps: iterations of each problem, summed.
      sketch_factor: rows of a sketch per unknown.
    """
    once = 2.0 * entries * rank
    # A residual and a transpose for the right-hand side; iterative solvers also
    # need the norm of a^T b. An iteration is one product each way.
    products = 2 * once if kind == "exact" else 3 * once
    gram = once * rank if kind in ("exact", "gram") else 0.0
    factorisation = 0.0
    vectors = 4.0 * unknowns * rank + 13.0 * unknown_steps * rank
    if kind in ("cg", "sketch"):
        products += 4.0 * entry_steps * rank
    if kind == "gram":
        vectors += 2.0 * unknown_steps * rank**2
    if kind == "exact":
        factorisation = unknowns * (rank**3 / 3 + 2.0 * rank**2)
    if kind == "sketch":
        products += entries * rank
        rows = (sketch_factor + 1) * rank
        factorisation = unknowns * (2.0 * rows * rank**2 - 2 * rank**3 / 3)
        vectors += 2.0 * rank**2 * (unknown_steps + 2 * unknowns)
    return Flops(products, gram, factorisation, vectors, 0.0)


def count_gauge(fixed: int, unknowns: int, rank: int, *, regularised: bool) -> float:
    """Return the FLOPs of changing the basis of a `[fixed, rank]` factor and its mate.

    With a ridge a Gram matrix and a rotation, else three rounds of CholeskyQR.
    """
    mate = 2.0 * unknowns * rank**2
    if regularised:
        return 4.0 * fixed * rank**2 + mate
    return 3 * (4.0 * fixed * rank**2 + rank**3) + mate


def count_sweep(
    layout: EntryLayout, method: Method, rank: int, stats: tuple[Stats, Stats]
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
