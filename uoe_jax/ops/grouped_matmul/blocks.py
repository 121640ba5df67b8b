"""Rows of groups cut into equal blocks that never straddle two groups."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Blocks(NamedTuple):
    """C blocks of P rows, in the order of the rows; the first `total` are used."""

    group: Int[Array, " C"]
    start: Int[Array, " C"]  # first row
    stop: Int[Array, " C"]  # end of the group
    first: Int[Array, " E"]  # first block of every group
    total: Int[Array, ""]


def cut_groups(offsets: Int[Array, " E1"], num_rows: int, block: int) -> Blocks:
    """Return the blocks of all groups; their number is bounded by the shapes."""
    num_groups = offsets.shape[0] - 1
    offsets = offsets.astype(jnp.int32)
    counts = -(-jnp.diff(offsets) // block)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    num_blocks = max(1, (num_rows + num_groups * (block - 1)) // block)
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    group = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    first = ends - counts
    start = offsets[group] + (index - first[group]) * block
    return Blocks(group, start, offsets[group + 1], first, ends[-1])


def own_rows(
    blocks: Blocks, index: Int[Array, ""], block: int, num_rows: int
) -> tuple[Int[Array, ""], Bool[Array, "P 1"]]:
    """Return where to read a block, and which of the rows read there are its own.

    The last block is read a little earlier where it would not fit.
    """
    start = blocks.start[index]
    at = jnp.minimum(start, num_rows - block)
    row = at + jnp.arange(block, dtype=at.dtype)
    return at, ((row >= start) & (row < blocks.stop[index]))[:, None]


def read_rows(
    x: Float[Array, "N I"],
    ids: Int[Array, " M"] | None,
    at: Int[Array, ""],
    block: int,
) -> Float[Array, "P I"]:
    """Return `block` rows of x, or of x[ids], from row `at` on."""
    if ids is None:
        return lax.dynamic_slice_in_dim(x, at, block)
    ids = lax.dynamic_slice_in_dim(ids, at, block)
    return x.at[ids].get(mode="promise_in_bounds")


def count_rows(x: jax.Array, ids: jax.Array | None) -> int:
    """Return M, the packed rows."""
    return x.shape[0] if ids is None else ids.shape[0]
