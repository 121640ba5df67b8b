"""What went wrong in a step whose loss or gradient wasn't finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.files import format_json, write_atomically
from uoe_jax.runs.state import TrainState
from uoe_jax.train.step import Batch, make_gradients, put_batch
from uoe_jax.train.subject import Subject
from uoe_jax.tree import named_leaves

_LAYERS = ".blocks."  # parameters below it have a leading layer axis


def hash_batch(batch: Mapping[str, np.ndarray]) -> str:
    """Return 16 hex digits that identify a batch's content."""
    state = hashlib.sha256()
    for name in sorted(batch):
        state.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
    return state.hexdigest()[:16]


def diagnose(
    config: ExperimentConfig,
    subject: Subject,
    batch: Mapping[str, np.ndarray],
    step: int,
) -> dict[str, Any]:
    """Repeat the gradient of step number `step` and return what in it isn't finite.

    Its state must be the one the step failed to change. Gradient norms are listed per
    parameter, and per layer where layers are stacked.
    """
    compute = make_gradients(
        config, subject.graphdef, subject.layout, subject.objective
    )

    def run(state: TrainState, batch: Batch, frozen: Any) -> Any:
        grads, sums, aux = compute(state, batch, jnp.int32(step - 1), frozen)
        return named_norms(grads), sums, aux, named_norms(state.params)

    placed = put_batch(batch, subject.layout.mesh, config.train.accumulate)
    norms, sums, aux, params = jax.device_get(
        jax.jit(run)(subject.state, placed, subject.frozen)
    )
    return {
        "step": step,
        "data_seed": config.data.seed,
        "batch_hash": hash_batch(batch),
        "batch_shapes": {name: list(a.shape) for name, a in batch.items()},
        "loss": float(sums["loss"]),
        "grad_norms": {name: _numbers(norm) for name, norm in norms.items()},
        "nonfinite_parameters": _nonfinite(params),
        "nonfinite_gradients": _nonfinite(norms),
        "nonfinite_router": _nonfinite(
            {
                f"{part}.router.{name}": np.asarray(values)
                for part, stats in aux.items()
                for name, values in stats.items()
            }
        ),
    }


def named_norms(tree: Any) -> dict[str, jax.Array]:
    """Return the norm of every leaf, one number per layer for stacked leaves."""
    norms = {}
    for name, leaf in named_leaves(tree).items():
        axes = tuple(range(1 if _LAYERS in name else 0, leaf.ndim))
        norms[name] = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axes))
    return norms


def write_dump(folder: Path, dump: Mapping[str, Any]) -> Path:
    """Write a diagnosis into the run's folder and return its path."""
    path = folder / f"nonfinite-{dump['step']}.json"
    write_atomically(path, format_json(dump, indent=2) + "\n")
    return path


def _numbers(values: np.ndarray) -> Any:
    """Return JSON numbers; those that aren't finite as text."""
    finite = lambda v: v if math.isfinite(v) else str(v)
    numbers = np.asarray(values).tolist()
    return (
        [finite(v) for v in numbers] if isinstance(numbers, list) else finite(numbers)
    )


def _nonfinite(values: Mapping[str, np.ndarray]) -> list[str]:
    """Return names of values that aren't all finite, with the layers concerned."""
    names = []
    for name, value in values.items():
        value = np.asarray(value)
        if value.ndim == 0:
            if not np.isfinite(value):
                names.append(name)
            continue
        bad = ~np.isfinite(value.reshape(value.shape[0], -1)).all(axis=1)
        names.extend(f"{name}[{layer}]" for layer in np.flatnonzero(bad))
    return names
