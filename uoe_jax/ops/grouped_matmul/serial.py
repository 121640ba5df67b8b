"""Blocks of rows one after the other, straight from the rows into the result: CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from uoe_jax.ops.grouped_matmul.blocks import (
    count_rows,
    cut_groups,
    own_rows,
    read_rows,
)
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.varying import zeros_varying

# Measured: 128 rows waste little; only a large product is worth two cores, so wide
# weights take twice the rows.
_BLOCK = 128
_WIDE = 512 * 512


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
    block = _choose_block(w.shape[1] * w.shape[2], num_rows)
    blocks = cut_groups(offsets, num_rows, block)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        at, own = own_rows(blocks, i, block, num_rows)
        weight = lax.dynamic_index_in_dim(w, blocks.group[i], keepdims=False)
        y = lax.dot_general(
            read_rows(x, ids, at, block),
            weight,
            contract,
            preferred_element_type=accumulator_dtype(x.dtype),
        )
        # Beside its own a block has rows of others: what is written there must stay.
        old = lax.dynamic_slice_in_dim(out, at, block)
        new = jnp.where(own, y.astype(out.dtype), old)
        return lax.dynamic_update_slice_in_dim(out, new, at, 0)

    width = w.shape[1] if transpose else w.shape[2]
    out = zeros_varying((num_rows, width), x.dtype, x)
    return lax.fori_loop(0, blocks.total, step, out)


def weight_grads(
    x: Float[Array, "Nx I"],
    grad: Float[Array, "Ng O"],
    offsets: Int[Array, " E1"],
    x_ids: Int[Array, " M"] | None,
    grad_ids: Int[Array, " M"] | None,
) -> Float[Array, "E I O"]:
    """Return every group's sum of x (outer) grad over its rows, float32 or wider."""
    num_rows = count_rows(x, x_ids)
    dtype = accumulator_dtype(x.dtype)
    block = _choose_block(x.shape[1] * grad.shape[1], num_rows)
    blocks = cut_groups(offsets, num_rows, block)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at, own = own_rows(blocks, i, block, num_rows)
        # Rows of others are masked on both sides: 0 * nan is nan.
        update = lax.dot_general(
            jnp.where(own, read_rows(x, x_ids, at, block), 0),
            jnp.where(own, read_rows(grad, grad_ids, at, block), 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=dtype,
        )
        return total.at[blocks.group[i]].add(update)

    shape = (offsets.shape[0] - 1, x.shape[1], grad.shape[1])
    return lax.fori_loop(0, blocks.total, step, zeros_varying(shape, dtype, x))


def _choose_block(weight_size: int, num_rows: int) -> int:
    return min(2 * _BLOCK if weight_size >= _WIDE else _BLOCK, num_rows)
