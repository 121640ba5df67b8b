"""What validation prefers of the runs so far, and what a run spent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.e012_evidence.models import LEAN
from experiments.shared.fronts import loss_at
from uoe_jax.errors import ConfigError

Row = dict[str, Any]  # a run's entry of the results file


def spent(row: Row, axis: str, steps: int) -> float:
    """Return what so many steps of a run take: tokens, training FLOPs or seconds."""
    step = {
        "tokens": row["tokens_per_step"],
        "flops": row["training_flops_per_step"],
        "seconds": row["step_seconds"],
    }
    return steps * step[axis]


def undisturbed(row: Row) -> bool:
    """Whether a run's seconds are of steps beside which nothing was compiled."""
    chunks = row.get("chunks")
    return chunks is None or chunks["compiled_meanwhile"] < chunks["all"]


def with_one_speed(rows: Sequence[Row]) -> list[Row]:
    """Return a model's runs with the same seconds a step: seeds run the same program.

    The median of the runs that nothing disturbed, if there are some; by device.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["device"], []).append(row)
    speed = {
        device: statistics.median(
            row["step_seconds"] for row in list(filter(undisturbed, same)) or same
        )
        for device, same in found.items()
    }
    return [row | {"step_seconds": speed[row["device"]]} for row in rows]


def validated(row: Row) -> float:
    """Return the mean of a run's valid bits/byte over its corpora; inf: it diverged."""
    if not row["lengths"] or row["lengths"][-1]["steps"] != row["steps"]:
        return math.inf
    return statistics.fmean(row["lengths"][-1]["valid"].values())


def by_validation(models: Mapping[str, Sequence[Row]], axis: str) -> list[str]:
    """Return names of models, what validation prefers first.

    All are read where they spent as much: at what the cheapest one's longest run takes.
    A model with a run that diverged is last.
    """
    ends = [spent(r, axis, r["steps"]) for rows in models.values() for r in rows]

    def loss(row: Row) -> float:
        if math.isinf(validated(row)):
            return math.inf
        front = [
            (spent(row, axis, line["steps"]), statistics.fmean(line["valid"].values()))
            for line in row["lengths"]
        ]
        found = loss_at(front, min(ends))
        return math.inf if found is None else found

    mean = {name: statistics.fmean(map(loss, rows)) for name, rows in models.items()}
    return sorted(mean, key=mean.__getitem__)


def survivors(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what block 3 leaves for M: dense, the best mixture, two lean unions by
    seconds, and the best of the other unions.

    Raises ConfigError where block 3 has none of one of these.
    """
    models = _models(rows, "3")
    pick = lambda kind, axis: by_validation(
        {n: r for n, r in models.items() if _kind(n) == kind}, axis
    )
    mixtures, unions = pick("mixture", "tokens"), pick("union", "tokens")
    lean = pick("lean", "seconds")
    if not (mixtures and unions and lean):
        raise ConfigError(
            "block 4 has what block 3 left, which has no runs of mixtures, unions and "
            "lean unions yet; run block 3 first"
        )
    return ("dense", mixtures[0], *lean[:2], unions[0])


def chosen_lean(rows: Sequence[Row]) -> str:
    """Return the lean union that block 3's first seed prefers by seconds.

    The first seed alone: what later seeds bring changes no block that has begun.
    Raises ConfigError while one of them hasn't been trained.
    """
    first = [row for row in rows if row["seed"] == 0 and row["case"] in LEAN]
    models = _models(first, "3")
    if lacking := sorted(set(LEAN) - set(models)):
        raise ConfigError(
            f"blocks 6 to 9 have the lean union that block 3 prefers, which lacks "
            f"{lacking[0]!r}; run block 3 first"
        )
    return by_validation(models, "seconds")[0]


def _models(rows: Sequence[Row], block: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["block"] == block:
            found.setdefault(row["case"], []).append(row)
    return {model: with_one_speed(runs) for model, runs in found.items()}


def _kind(name: str) -> str:
    if name in LEAN:
        return "lean"
    return {"MoE": "mixture", "UoM": "union"}.get(name[:3], "dense")
