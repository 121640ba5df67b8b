"""A changed model written as a run that trains, evaluates and generates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.config import ExperimentConfig
from uoe_jax.data.record import carried_record
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.files import format_json, read_json, write_atomically
from uoe_jax.optim import make_optimizer
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.runs.folder import BEST, CHECKPOINTS, open_run_dir, write_environment
from uoe_jax.runs.integrity import digest_array
from uoe_jax.runs.state import Progress, TrainState

RESULT, ORDER = "decompose.json", "neuron_order.npy"
Which = Literal["last", "best"]


def check_free(out: Path) -> None:
    """Raise ConfigError if a folder holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} isn't empty; choose another --out")


def write_run(
    out: Path,
    config: ExperimentConfig,
    model: nnx.Module,
    source: Path,
    step: int,
    which: Which,
) -> None:
    """Write a model as the checkpoint of a run that stands at `step`.

    What the source run spent (seconds, tokens, FLOPs) is carried over; the optimizer
    starts anew. There are no metrics yet, so the first `uoe train` may change fields.
    """
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=optimizer.init(params),
        buffers=buffers,
        bad_steps=jnp.int32(0),
    )
    store = Checkpoints(source / (BEST if which == "best" else CHECKPOINTS))
    template = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    spent = Progress(**store.restore(template, step=step)[2])
    progress = Progress(seconds=spent.seconds, tokens=spent.tokens, flops=spent.flops)
    with open_run_dir(out, config, data=carried_record(source, config)):
        write_environment(out, {"decomposed_from": str(source)})
        checkpoints = Checkpoints(out / CHECKPOINTS)
        described = dataclasses.asdict(config)
        checkpoints.save(step, snapshot(state), described, progress.as_json())
        checkpoints.close()


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write what was found beside the run."""
    write_atomically(out / RESULT, format_json(result, indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what `uoe decompose` wrote of a run, or None; DataError if damaged."""
    file = folder / RESULT
    if not file.is_file():
        return None
    try:
        return dict(read_json(file))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); decompose again") from None


def find_order(folder: Path) -> np.ndarray | None:
    """Return the order of neurons a union run was split with; None if it has none.

    Raises DataError if the file isn't the one that was written.
    """
    file, result = folder / ORDER, read_result(folder)
    if result is None or not file.is_file():
        return None
    try:
        order = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} can't be read ({error}); restore it") from None
    if digest_array(order) != result.get("neuron_order"):
        raise DataError(f"{file} isn't what {RESULT} says; restore it")
    return order
