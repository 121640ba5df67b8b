"""A run read back: its model with the parameters of a checkpoint, and its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jaxtyping import PyTree

from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import Dataset, make_dataset
from uoe_jax.data.batches import open_dataset
from uoe_jax.data.prepare import find_prepared
from uoe_jax.data.progress import note_once
from uoe_jax.data.record import (
    check_recorded,
    is_moved,
    other_data,
    read_record,
    with_run_tokenizer,
)
from uoe_jax.errors import CheckpointError, DataError
from uoe_jax.model import abstract_model
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import BEST, CHECKPOINTS, CONFIG, check_saved
from uoe_jax.runs.state import Progress, check_buffers
from uoe_jax.runs.stored import run_folder
from uoe_jax.tree import fill_leaves, named_leaves
from uoe_jax.validation import read_config

ADAPTATION = "adaptation.json"  # in the folder of an adapter's run: what it is of


class LoadedRun(NamedTuple):
    """A run's config, its model with the parameters of a checkpoint, and the step."""

    config: ExperimentConfig
    model: nnx.Module
    step: int
    folder: Path
    progress: Progress  # the totals at that step


class SavedWeights(NamedTuple):
    """What a checkpoint has of a model: arrays by name, and where they go."""

    graphdef: nnx.GraphDef
    template: dict[str, PyTree]  # shapes of `params` and `buffers`
    arrays: dict[str, Any]
    step: int
    progress: Progress


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
    run_dir = run_folder(run_dir, "the run")
    run_dir, config, saved = read_run(run_dir, which=which, step=step)
    state = jax.device_put(fill_leaves(saved.template, saved.arrays))
    model = nnx.merge(saved.graphdef, *state.values())
    return LoadedRun(config, model, saved.step, run_dir, saved.progress)


def read_run(
    run_dir: Path,
    *,
    which: Literal["last", "best"] = "last",
    step: int | None = None,
) -> tuple[Path, ExperimentConfig, SavedWeights]:
    """Return a run's folder here, its config, and a checkpoint on the host.

    Raises what `load_run` does.
    """
    run_dir = run_folder(run_dir, "the run")
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
    return run_dir, config, read_weights(run_dir, config, which=which, step=step)


def read_weights(
    run_dir: Path,
    config: ExperimentConfig,
    *,
    which: Literal["last", "best"] = "last",
    step: int | None = None,
) -> SavedWeights:
    """Return a checkpoint's parameters and buffers on the host, checked.

    Raises CheckpointError as `load_run` does, and for rotated pairs that can't be.
    """
    graphdef, params, buffers = abstract_model(config.model)
    template = {"params": params, "buffers": buffers}
    store = Checkpoints(run_dir / (BEST if which == "best" else CHECKPOINTS))
    step, arrays, progress = store.restore(named_leaves(template), step=step)
    check_saved(run_dir, config, store.config(step), step)
    check_buffers(run_dir, config.model, arrays)
    return SavedWeights(graphdef, template, arrays, step, Progress(**progress))


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
    run_dir = run_folder(run_dir, "the run")
    record = read_record(run_dir)
    data, other = data or config.data, False
    if data != config.data and other_data(config, data):
        other = True
        data = with_run_tokenizer(config, data, run_dir)
    elif is_moved(data):
        data = with_run_tokenizer(config, data, run_dir)
    config = dataclasses.replace(config, data=data)
    try:
        dataset = make_dataset(config, split)
    except DataError as error:
        kept = None if other else find_prepared(config)
        if kept is None or record is None or not record.holds(kept):
            if other or not (data.path or data.mix):
                raise
            option = "--data.mix" if data.mix else "--data.path"
            raise DataError(
                f"{error} (uoe eval reads it from elsewhere with {option})"
            ) from None
        note_once(f"{error}: reading the data of {run_dir} as it was prepared")
        dataset = open_dataset(config, split, kept)
    accept = other or data.allow_changed
    check_recorded(record, dataset.prepared, run_dir, accept=accept)
    return dataset
