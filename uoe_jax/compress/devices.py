"""Rows of a text divided over devices while a model is observed: each sums its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from uoe_jax.config import MeshConfig
from uoe_jax.model.context import Context
from uoe_jax.model.observe import RunLayer, Stream
from uoe_jax.model.transformer import Block
from uoe_jax.partition.mesh import DATA_AXIS, make_mesh, split_over_data

# (block, residual, context, which tokens count) -> what `RunLayer` returns, with sums
ObserveLayer = Callable[..., tuple[Array, Array, dict[str, Array]]]


def data_mesh(rows: int) -> Mesh | None:
    """Return a mesh of this process's devices to share rows; None: there is one."""
    devices = jax.local_devices()[:rows]
    if len(devices) < 2:
        return None
    return make_mesh(MeshConfig(data=len(devices)), devices=devices)


def begin(
    model: Any,
    part: Mapping[str, np.ndarray],
    mesh: Mesh | None,
    observe: ObserveLayer,
) -> tuple[Stream, RunLayer]:
    """Return a batch on its way through a model, and what observes a layer of it.

    Over a mesh rows that don't divide are filled up with copies that count as padding.
    """
    if mesh is None:
        stream = Stream(model, part)
        return stream, functools.partial(observe, valid=jnp.asarray(stream.valid))
    rows = len(next(iter(part.values())))
    places = np.arange(-(-rows // mesh.size) * mesh.size)
    split = split_over_data(mesh)
    filled = {k: np.asarray(v)[places % rows] for k, v in part.items()}
    stream = Stream(model, jax.device_put(filled, split))
    stream.valid &= (places < rows)[:, None]
    valid = jax.device_put(stream.valid, split)
    return stream, functools.partial(_shared(observe, mesh), valid=valid)


@functools.cache
def _shared(observe: ObserveLayer, mesh: Mesh) -> ObserveLayer:
    """Return what observes a layer with its rows divided over a mesh's devices."""

    def own(
        block: Block, x: Array, text: tuple[Array, Array | None], valid: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        context = Context(*text, None, None, False)
        residual, output, sums = observe(block, x, context, valid=valid)
        return residual, output, jax.lax.psum(sums, DATA_AXIS)

    rows, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(whole, rows, rows, rows),
            out_specs=(rows, rows, whole),
        )
    )
    return lambda block, x, context, *, valid: run(
        block, x, (context.positions, context.segments), valid
    )
