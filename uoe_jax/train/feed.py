"""Batches onto the mesh; each process reads the rows that its devices hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from uoe_jax.data import Dataset
from uoe_jax.hardware import count
from uoe_jax.partition.layout import batch_spec
from uoe_jax.train.step import put_batch


def train_batch(
    data: Dataset, step: int, mesh: Mesh, accumulate: int
) -> dict[str, jax.Array]:
    """Return batch number `step` as microbatches [A, B/A, ...] on the mesh.

    Row r of microbatch a is the same example for every number of processes and
    devices.
    """
    if jax.process_count() == 1:
        return put_batch(data.batch(step), mesh, accumulate)
    shards = row_shards(mesh)
    parts: dict[tuple[int, int], Mapping[str, np.ndarray]] = {}
    for shard in local_shards(mesh):
        for part in range(accumulate):
            parts[part, shard] = data.batch(
                step,
                process_index=part * shards + shard,
                process_count=accumulate * shards,
            )
    return _assemble(parts, mesh, accumulate, shards)


def flop_share(data: Dataset, step: int) -> float:
    """Return the share of whole rows' FLOPs a token that batch `step` costs."""
    config, lengths = data.config, data.lengths(step)
    if lengths is None:
        return 1.0
    return count.flop_share(config.model, config.seq_len, lengths.tolist())


def whole_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return a batch that every process has whole, as one microbatch on the mesh."""
    if jax.process_count() == 1:
        return put_batch(batch, mesh)
    return {
        name: _array(mesh, value[None].shape, lambda index, v=value: v[None][index])
        for name, value in batch.items()
    }


def row_shards(mesh: Mesh) -> int:
    """Return into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape.get("fsdp", 1)


def local_shards(mesh: Mesh) -> list[int]:
    """Return the row parts that this process's devices hold."""
    names, found = mesh.axis_names, set()
    for place, device in np.ndenumerate(mesh.devices):
        if device.process_index == jax.process_index():
            at = dict(zip(names, place, strict=True))
            found.add(at["data"] * mesh.shape.get("fsdp", 1) + at.get("fsdp", 0))
    return sorted(found)


def _assemble(
    parts: Mapping[tuple[int, int], Mapping[str, np.ndarray]],
    mesh: Mesh,
    accumulate: int,
    shards: int,
) -> dict[str, jax.Array]:
    batch = {}
    for name, example in next(iter(parts.values())).items():
        rows = example.shape[0]

        def read(index: Any, name: str = name, rows: int = rows) -> np.ndarray:
            shard = (index[1].start or 0) // rows
            wanted = range(accumulate)[index[0]]
            block = np.stack([parts[part, shard][name] for part in wanted])
            return block[(slice(None), slice(None), *index[2:])]

        shape = (accumulate, rows * shards, *example.shape[1:])
        batch[name] = _array(mesh, shape, read)
    return batch


def _array(
    mesh: Mesh, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]
) -> jax.Array:
    sharding = NamedSharding(mesh, batch_spec(mesh, len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)
