"""What a run that goes on must be told: what is lost, what will go, what jumps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import ExperimentConfig, OptimConfig
from uoe_jax.errors import CheckpointError
from uoe_jax.files import read_json_lines
from uoe_jax.optim import make_schedule
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import METRICS

_SMALL_JUMP = 0.01  # of the larger rate


def check_not_lost(run_dir: Path, checkpoints: Checkpoints, best: Checkpoints) -> None:
    """Raise CheckpointError where a run has trained and has no checkpoint any more.

    A run saves before its first step, so somebody must have deleted them. Starting anew
    would overwrite the metrics and the best model.
    """
    file = run_dir / METRICS
    if checkpoints.steps() or not file.is_file():
        return
    records = read_json_lines(file, step=True).records
    last = max((r["step"] for r in records if r["kind"] == "train"), default=0)
    if not last:
        return
    kept = best.steps()
    model = f" (its best model, of step {kept[-1]}, is still there)" if kept else ""
    raise CheckpointError(
        f"{run_dir} has trained to step {last}{model} but has no whole checkpoint: "
        f"put {checkpoints.folder} back, or start anew in another --run-dir"
    )


def describe_newer(
    step: int, checkpoints: Checkpoints, best: Checkpoints
) -> str | None:
    """Return which checkpoints the next saves delete, going back to a step."""
    newer = [f"step {s}" for s in checkpoints.newer_than(step)]
    newer += [f"the best model, of step {s}" for s in best.newer_than(step)]
    if not newer:
        return None
    return (
        f"newer than step {step}: {', '.join(newer)}; the next save deletes them, the "
        "next step their metrics"
    )


def describe_rate_jump(
    step: int, saved: Mapping[str, Any], config: ExperimentConfig
) -> str | None:
    """Return how far the learning rate jumps because a run has more or fewer steps."""
    before, after = saved.get("train", {}).get("steps"), config.train.steps
    if not isinstance(before, int) or before == after or step >= after or step < 1:
        return None
    optim: OptimConfig = config.optim
    schedules = make_schedule(optim, before), make_schedule(optim, after)
    old, new = (lambda at, f=f: float(np.asarray(f(at))) for f in schedules)
    if abs(old(step) - new(step)) <= _SMALL_JUMP * max(old(step), new(step)):
        return None
    return (
        f"train.steps is {after}, was {before}: the {optim.schedule} schedule is "
        f"stretched over them, so the learning rate goes from {old(step - 1):.3g} to "
        f"{new(step):.3g} after step {step}"
    )


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """Return a mesh in words: `data 4 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def describe_resharding(
    saved: Mapping[str, Any], sizes: Mapping[str, int]
) -> str | None:
    """Return from which mesh to which a checkpoint's arrays went, if to another."""
    before = saved.get("mesh")
    if not before or dict(before) == dict(sizes):
        return None
    return f"resharded from {describe_mesh(before)} to {describe_mesh(sizes)}"
