"""At what rate a run is trained, from the runs so far."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.e012_evidence.choose import Row, validated
from experiments.e012_evidence.models import SIZES
from experiments.e012_evidence.study import SEARCH_SEED, Job

CONTINUED = 0.3  # of the rate that a run's start was trained at


def choose_rate(
    rows: Sequence[Row], job: Job, family: str, middle: float
) -> tuple[float, str]:
    """Return a run's rate, and what it is by: `given`, `search`, or `default`.

    A model's seeds have one rate, whenever they are trained. Models that are compared
    with some that no search stood behind have the `middle` of their grid too. A run
    that goes on has a part of its start's rate, also where a search came later.
    """
    if job.rate is not None:
        return job.rate, "given"
    if job.start is not None:
        for row in rows:
            if _is_run(row, job.start):
                return CONTINUED * row["rate"], row["rate_by"]
    alike = [
        row for row in rows
        if row["setting"] == job.setting and row["planned_steps"] == list(job.steps)
        and row["optimizer"] == job.optimizer and row["seed"] != SEARCH_SEED
    ]  # fmt: skip
    for row in alike:
        if row["case"] == job.name:
            return row["rate"], row["rate_by"]
    rate, by = best_rate(rows, job, family), "search"
    if rate is None or any(row["rate_by"] == "default" for row in alike):
        rate, by = middle, "default"
    return (rate if job.start is None else CONTINUED * rate), by


def _is_run(row: Row, job: Job) -> bool:
    """Whether a row is of that training: model, size, steps, optimizer and seed."""
    return (
        row["setting"] == job.setting
        and row["planned_steps"] == list(job.steps)
        and row["optimizer"] == job.optimizer
        and row["seed"] == job.seed
        and row["case"] == job.name
    )


def best_rate(rows: Sequence[Row], job: Job, family: str) -> float | None:
    """Return the rate that a family's search found for a size; None: none was searched.

    A size without a search of its own takes that of the nearest searched one, scaled
    by the middles of both grids.
    """
    searched = [
        row for row in rows
        if row["block"] == "2" and row["family"] == family
        and row["optimizer"] == job.optimizer
    ]  # fmt: skip
    for size in (job.size, "M", "S", "tiny"):
        mine = [row for row in searched if row["size"] == size]
        if mine:
            found = min(mine, key=validated)["rate"]
            return round(found * SIZES[job.size].rate / SIZES[size].rate, 7)
    return None
