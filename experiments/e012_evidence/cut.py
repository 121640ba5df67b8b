"""A trained dense model's end in a file, and the models that go on from there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import PyTree

from experiments.e012_evidence.models import CUT
from uoe_jax.config import ExperimentConfig
from uoe_jax.decompose.plan import as_written, make_plan
from uoe_jax.files import write_atomically
from uoe_jax.model import flat_params, split_model, with_params
from uoe_jax.runs.batches import calibration_batch
from uoe_jax.runs.probe import in_float32


def save_model(
    file: Path, config: ExperimentConfig, params: PyTree, buffers: PyTree
) -> None:
    """Write a trained model's parameters."""
    model = nnx.merge(split_model(config.model)[0], params, buffers)
    content = io.BytesIO()
    arrays = {name: np.asarray(a) for name, a in flat_params(model).items()}
    np.savez(content, **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())


def go_on(
    file: Path, dense: ExperimentConfig, config: ExperimentConfig
) -> tuple[PyTree, PyTree]:
    """Return parameters and buffers that `config` starts from: a dense model's end.

    As it is, or cut into experts: grouped by co-activation, the neurons that write most
    always on, routers and down-projections fitted on training data.
    """
    with np.load(file, allow_pickle=False) as saved:
        arrays = dict(saved)
    biases: dict[str, np.ndarray] = {}
    if config.model != dense.model:
        batch = calibration_batch(dense, CUT.calibrate)
        model = with_params(in_float32(dense.model), arrays)
        plan = make_plan(model, config.model, CUT, batch)
        arrays, biases = as_written(plan, config.model)
    _, params, buffers = nnx.split(
        with_params(config.model, arrays, biases), nnx.Param, ...
    )
    return params, buffers
