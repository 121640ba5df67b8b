"""Loss, perplexity, bits per byte, accuracy and routing of a trained run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from uoe_jax.checkpoint import Checkpoints
from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import Dataset, make_dataset
from uoe_jax.data.batches import open_dataset
from uoe_jax.data.prepare import find_prepared
from uoe_jax.data.progress import note_once
from uoe_jax.data.record import (
    check_recorded,
    other_data,
    read_record,
    with_run_tokenizer,
)
from uoe_jax.errors import CheckpointError, ConfigError, DataError
from uoe_jax.model import split_model
from uoe_jax.partition.mesh import evaluation_mesh
from uoe_jax.train.run_dir import BEST, CHECKPOINTS, CONFIG, check_model
from uoe_jax.train.state import layout_of
from uoe_jax.train.validate import make_eval_step, run_validation
from uoe_jax.tree import fill_leaves, named_leaves
from uoe_jax.validation import read_config

ADAPTATION = "adaptation.json"  # in the folder of an adapter's run: what it is of


class LoadedRun(NamedTuple):
    """A run's config, its model with the parameters of a checkpoint, and the step."""

    config: ExperimentConfig
    model: nnx.Module
    step: int
    folder: Path


def load_run(
    run_dir: Path,
    *,
    which: Literal["last", "best"] = "last",
    step: int | None = None,
) -> LoadedRun:
    """Return a run's model from its newest, its best or the asked-for checkpoint.

    Raises CheckpointError if `run_dir` isn't a run, has no such checkpoint or the
    checkpoint's checksums don't match, ConfigError if its config can't be.
    """
    run_dir = Path(run_dir)
    file = run_dir / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{run_dir} isn't a run: it has no {CONFIG}; give a folder that "
            "`uoe train` wrote"
        )
    if (run_dir / ADAPTATION).is_file():
        raise CheckpointError(
            f"{run_dir} is the run of an adapter, not of a whole model; give its "
            f"{run_dir / 'merged'}, which `uoe adapt --merge` writes"
        )
    config = read_config(run_dir)
    graphdef, make = split_model(config.model, config.train.seed)
    params, buffers = jax.eval_shape(make)
    template = {"params": params, "buffers": buffers}
    store = Checkpoints(run_dir / (BEST if which == "best" else CHECKPOINTS))
    step, arrays, _ = store.restore(named_leaves(template), step=step)
    check_model(run_dir, config, store.config(step))
    state = jax.device_put(fill_leaves(template, arrays))
    return LoadedRun(config, nnx.merge(graphdef, *state.values()), step, run_dir)


def run_dataset(
    run_dir: Path,
    config: ExperimentConfig,
    split: str,
    data: DataConfig | None = None,
) -> Dataset:
    """Return a split of a run's data, or of the data that `data` names.

    Other data is read with the run's tokenizer. The run's own is read as it was
    prepared where its source is gone or has changed since. Raises DataError if neither
    is what it was, unless `allow_changed`, or if other data was prepared with another
    tokenizer.
    """
    run_dir, record = Path(run_dir), read_record(Path(run_dir))
    data, other = data or config.data, False
    if data != config.data and other_data(config, data):
        other = True
        data = with_run_tokenizer(config, data, run_dir)
    config = dataclasses.replace(config, data=data)
    try:
        dataset = make_dataset(config, split)
    except DataError as error:
        kept = None if other else find_prepared(config)
        if kept is None or record is None or not record.holds(kept):
            if other or data.path is None:
                raise
            raise DataError(
                f"{error} (uoe eval reads it from elsewhere with --data.path)"
            ) from None
        note_once(f"{error}: reading the data of {run_dir} as it was prepared")
        dataset = open_dataset(config, split, kept)
    accept = other or data.allow_changed
    check_recorded(record, dataset.prepared, run_dir, accept=accept)
    return dataset


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
