"""What several seeds of a case say together."""

from __future__ import annotations

import math
import statistics
from typing import Any

Result = dict[str, Any]


def badness(scores: dict[str, float], metric: str) -> float:
    """Return what validation minimises: the loss, or of a classifier its errors."""
    value = -scores["accuracy"] if metric == "accuracy" else scores["loss"]
    return value if math.isfinite(value) else math.inf


def values(results: list[Result], split: str, metric: str) -> list[float]:
    """Return the seeds' values; a run that diverged has none and counts as infinite."""
    worst = float("inf") if metric != "accuracy" else 0.0
    return [r[split][metric] if split in r else worst for r in results]


def spread(numbers: list[float]) -> float:
    """Return the sample standard deviation, 0 for one value or one that is infinite."""
    known = len(numbers) > 1 and all(map(math.isfinite, numbers))
    return statistics.stdev(numbers) if known else 0.0


def deltas(first: list[Result], second: list[Result], metric: str) -> list[float]:
    """Return first - second on test of every seed that both have, in their order.

    Seeds share the order of the data.
    """
    scores = [
        {r["seed"]: r["test"][metric] for r in results if "test" in r}
        for results in (first, second)
    ]
    both = sorted(scores[0].keys() & scores[1].keys())
    return [scores[0][seed] - scores[1][seed] for seed in both]


def difference(
    first: list[Result], second: list[Result], metric: str
) -> tuple[float, float | None] | None:
    """Return the mean of first - second on test over the seeds both have, and its
    standard error, None of a single seed."""
    paired = deltas(first, second, metric)
    if not paired:
        return None
    error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else None
    return statistics.fmean(paired), error


def median_seconds(results: list[Result]) -> float:
    """Return the seconds of training that a run takes at its median step."""
    return statistics.median(r["step_seconds"] * r["steps"] for r in results)
