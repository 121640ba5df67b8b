"""A split's examples as arrays on the device, and batches of them inside jit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.shared.case import change
from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, make_dataset
from uoe_jax.data.order import eval_order

Arrays = dict[str, Array]
Batch = dict[str, Array]
_ROWS = 8192  # examples read at once


def load_split(config: ExperimentConfig, split: str, limit: int = 0) -> Arrays:
    """Return every example of a split on the device, integers in as few bytes as fit.

    Nothing is left out but what a row of a stream has anyway: its positions, its one
    segment and its mask. `limit` takes the first so many examples of the fixed order
    of evaluation.
    """
    data = make_dataset(config, split)
    count = min(limit, data.num_examples) if limit else data.num_examples
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, count, _ROWS):
        rows = np.arange(first, min(first + _ROWS, count))
        if limit:
            rows = eval_order(rows, data.num_examples)
        for name, values in _compact(data, rows).items():
            parts.setdefault(name, []).append(values)
    return {name: jnp.asarray(np.concatenate(p)) for name, p in parts.items()}


def _compact(data: Dataset, rows: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
    batch = data.examples(rows)
    if "targets" in batch:
        batch = {name: batch[name] for name in ("tokens", "targets", "mask")}
        if batch["mask"].all():
            del batch["mask"]
    if "segments" in batch:
        batch["segments"] = batch["segments"].astype(np.uint8)
    narrow = data.config.model.vocab_size <= 256
    return {
        name: a.astype(np.uint8 if narrow else np.uint16)
        if name in ("tokens", "targets")
        else a
        for name, a in batch.items()
    }


def num_examples(arrays: Arrays) -> int:
    """Return how many examples a split on the device has."""
    return len(next(iter(arrays.values())))


def train_rows(
    config: ExperimentConfig, seed: int, steps: int
) -> Int[np.ndarray, "S B"]:
    """Return the examples of every training batch, the same as the trainer's."""
    size = config.data.batch_size
    data = make_dataset(change(config, data={"seed": seed}), "train")
    return data.choose(0, steps * size).reshape(steps, size).astype(np.int32)


def eval_rows(config: ExperimentConfig, count: int) -> Int[np.ndarray, "S B"]:
    """Return the examples of every evaluation batch; -1 fills up the last."""
    size = config.data.batch_size
    rows = np.full(-(-count // size) * size, -1, np.int32)
    rows[:count] = np.arange(count)
    return rows.reshape(-1, size)


def make_take(config: ExperimentConfig) -> Callable[[Arrays, Array], Batch]:
    """Return (arrays, rows [B]) -> batch [1, B, ...], as a training step takes it."""

    def take(arrays: Arrays, rows: Int[Array, " B"]) -> Batch:
        real = rows >= 0
        batch = {name: a[jnp.maximum(rows, 0)] for name, a in arrays.items()}
        if "labels" in batch:
            batch["labels"] = jnp.where(real, batch["labels"].astype(jnp.int32), -1)
            if "tokens" in batch:
                batch["segments"] = batch["segments"].astype(jnp.int32)
        else:
            shape = batch["tokens"].shape
            mask = batch.get("mask", jnp.ones(shape, jnp.float32))
            batch["mask"] = mask.astype(jnp.float32) * real[:, None]
            batch["segments"] = jnp.ones(shape, jnp.int32) * real[:, None]
            positions = jnp.arange(shape[1], dtype=jnp.int32)
            batch["positions"] = jnp.broadcast_to(positions, shape)
        for name in ("tokens", "targets"):
            if name in batch:
                batch[name] = batch[name].astype(jnp.int32)
        return jax.tree.map(lambda a: a[None], batch)

    return take
