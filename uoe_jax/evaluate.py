"""Loss, perplexity, bits per byte, accuracy and routing of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, make_dataset
from uoe_jax.errors import ConfigError
from uoe_jax.partition.mesh import evaluation_mesh
from uoe_jax.runs.state import layout_of
from uoe_jax.train.validate import make_eval_step, run_validation


def evaluate(
    model: nnx.Module,
    config: ExperimentConfig,
    *,
    split: str = "valid",
    max_batches: int | None = None,
    dataset: Dataset | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Return a model's numbers on a split: all of it, or its first batches.

    loss (nats per token or example), perplexity, bits_per_byte (None for data without
    bytes), accuracy, balance_loss, z_loss, router (load and entropy by layer).
    """
    if dataset is None:
        dataset = make_dataset(config, split)
    (found,) = evaluate_all(model, config, [dataset], max_batches, mesh)
    return found


def evaluate_all(
    model: nnx.Module,
    config: ExperimentConfig,
    datasets: Sequence[Dataset],
    max_batches: int | None = None,
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Return what `evaluate` does for several datasets, by one compiled program.

    Raises ConfigError for a `max_batches` below 1.
    """
    if max_batches is not None and max_batches < 1:
        raise ConfigError(
            f"max_batches is {max_batches}; it must be at least 1, or None for all"
        )
    if mesh is None:
        mesh = evaluation_mesh(config)
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    layout = layout_of(config, mesh)
    params, buffers = layout.place((layout.to_memory(params), buffers))
    step = make_eval_step(config, graphdef, mesh)
    return [
        run_validation(step, params, buffers, dataset, mesh, max_batches)
        for dataset in datasets
    ]
