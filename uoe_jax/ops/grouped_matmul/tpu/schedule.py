"""Which rows meet which weight, as a static list of work items for the TPU kernels.

Cuts at every tile start and at every group start give exactly C + E items (C tiles, E
groups), in row order. Each tile and each group has at least one; some are empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from uoe_jax.ops.tpu import LANES
from uoe_jax.varying import vary_together


class Items(NamedTuple):
    """Item i multiplies rows start[i]:end[i] of tile[i] by the weight of group[i]."""

    tile: Int[Array, " n"]
    group: Int[Array, " n"]
    start: Int[Array, " n"]
    end: Int[Array, " n"]
    fetch: Int[Array, " n"]  # weight to hold: the last one used, if there is no row

    def pack(self) -> Int[Array, " n5"]:
        """Return the items as prefetched scalars, item after item."""
        return jnp.stack(self, axis=1).reshape(-1)


def read_item(scalars: Any, index: Any) -> Items:
    """Return one item from the prefetched scalars."""
    width = len(Items._fields)
    return Items(*(scalars[index * width + field] for field in range(width)))


def work_items(offsets: Int[Array, " E1"], num_rows: int, tile: int) -> Items:
    """Return the items of `num_rows` rows in tiles of `tile`."""
    num_groups = offsets.shape[0] - 1
    num_tiles = -(-num_rows // tile)
    offsets, firsts, names = vary_together(
        offsets.astype(jnp.int32),
        jnp.arange(num_tiles, dtype=jnp.int32) * tile,
        jnp.arange(num_groups, dtype=jnp.int32),
    )
    # A tile starts in the last group that starts at or before its first row.
    owner = jnp.sum(offsets[None, :-1] <= firsts[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.maximum(owner - 1, 0)
    rows = jnp.concatenate([offsets[:-1], firsts])
    groups = jnp.concatenate([names, owner])
    groups, start = jax.lax.sort((groups, rows), num_keys=2)
    following = jnp.pad(start[1:], (0, 1), constant_values=num_rows)
    same = jnp.pad(groups[1:] == groups[:-1], (0, 1))
    end = jnp.minimum(jnp.where(same, following, num_rows), offsets[groups + 1])
    end = jnp.maximum(end, start)
    used = jnp.where(end > start, groups, 0)
    return Items(
        tile=jnp.minimum(start // tile, num_tiles - 1),
        group=groups,
        start=start,
        end=end,
        fetch=jax.lax.cummax(used),
    )


def computed_rows(offsets: jax.Array, num_rows: int, tile: int) -> int:
    """Return the rows that the kernels multiply, whole grains at group borders."""
    items = work_items(offsets, num_rows, tile)
    tiles, _, start, end, _ = (np.asarray(field) for field in items)
    first, last = start - tiles * tile, end - tiles * tile
    grains = -(-last // LANES) - first // LANES
    whole = (first == 0) & (last == tile)
    return int(np.where(end > start, np.where(whole, tile, grains * LANES), 0).sum())
