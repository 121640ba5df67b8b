"""Several blocks of rows in one batched product: GPU and TPU.

Each block of a batch brings a copy of its weight, so blocks are large and batches
small: the copies then cost less than the rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from uoe_jax.ops.grouped_matmul.blocks import (
    Blocks,
    count_rows,
    cut_groups,
    own_rows,
    read_rows,
)
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.varying import zeros_varying

_BLOCK = 512
_BATCH = 16


def products(
    x: Float[Array, "N A"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
    ids: Int[Array, " M"] | None,
    *,
    transpose: bool,
) -> Float[Array, "M B"]:
    """Return each row (of x, or of x[ids]) times its group's weight (transposed)."""
    num_rows = count_rows(x, ids)
    block = min(_BLOCK, num_rows)
    blocks = cut_groups(offsets, num_rows, block)
    equation = "cpo,cio->cpi" if transpose else "cpi,cio->cpo"

    def run_batch(index: jax.Array) -> jax.Array:
        at, _ = _own_rows(blocks, index, block, num_rows)
        rows = jax.vmap(lambda a: read_rows(x, ids, a, block))(at)
        weights = w.at[blocks.group[index]].get(mode="promise_in_bounds")
        y = jnp.einsum(
            equation,
            rows,
            weights,
            preferred_element_type=accumulator_dtype(x.dtype),
        )
        return y.astype(x.dtype)

    out = lax.map(run_batch, _batches(blocks))
    out = out.reshape(-1, out.shape[-1])
    # Where each row went; a block that was read earlier holds it further down.
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(offsets[1:], row, side="right").astype(jnp.int32)
    group = jnp.minimum(group, offsets.shape[0] - 2)
    index = blocks.first[group] + (row - offsets[group]) // block
    place = row - jnp.minimum(blocks.start[index], num_rows - block)
    place = jnp.where(row < offsets[-1], index * block + place, out.shape[0])
    return out.at[place].get(mode="fill", fill_value=0)


def weight_grads(
    x: Float[Array, "Nx I"],
    grad: Float[Array, "Ng O"],
    offsets: Int[Array, " E1"],
    x_ids: Int[Array, " M"] | None,
    grad_ids: Int[Array, " M"] | None,
) -> Float[Array, "E I O"]:
    """Return every group's sum of x (outer) grad over its rows, float32 or wider."""
    num_rows, num_groups = count_rows(x, x_ids), offsets.shape[0] - 1
    dtype = accumulator_dtype(x.dtype)
    # A block makes a gradient of a whole weight, whatever its rows: they are larger
    # here, and fewer at a time.
    block = min(4 * _BLOCK, num_rows)
    blocks = cut_groups(offsets, num_rows, block)

    def run_batch(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        at, own = _own_rows(blocks, index, block, num_rows)
        rows = jax.vmap(lambda a: read_rows(x, x_ids, a, block))(at)
        grads = jax.vmap(lambda a: read_rows(grad, grad_ids, a, block))(at)
        # Rows of others are masked on both sides: 0 * nan is nan.
        update = jnp.einsum(
            "cpi,cpo->cio",
            jnp.where(own, rows, 0),
            jnp.where(own, grads, 0),
            preferred_element_type=dtype,
        )
        # A product with ones and zeros adds in a fixed order; a scatter would not.
        member = jax.nn.one_hot(blocks.group[index], num_groups, dtype=dtype)
        return total + jnp.einsum(
            "ce,cio->eio", member, update, precision=lax.Precision.HIGHEST
        ), None

    shape = (num_groups, x.shape[1], grad.shape[1])
    start = zeros_varying(shape, dtype, x)
    return lax.scan(run_batch, start, _batches(blocks, _BATCH // 2))[0]


def _batches(blocks: Blocks, batch: int = _BATCH) -> jax.Array:
    """Return the block numbers in batches; those past the last are never used."""
    num_blocks = blocks.group.shape[0]
    batch = min(batch, num_blocks)
    count = -(-num_blocks // batch) * batch
    return jnp.arange(count, dtype=jnp.int32).reshape(-1, batch)


def _own_rows(
    blocks: Blocks, index: jax.Array, block: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    at, own = jax.vmap(lambda i: own_rows(blocks, i, block, num_rows))(index)
    return at, own & (index < blocks.total)[:, None, None]
