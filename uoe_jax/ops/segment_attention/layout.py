"""Cutting packed rows into equal blocks that never straddle two segments."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.segment_attention.call import Mask


class Layout(NamedTuple):
    """Rows in C blocks of P slots, and what each slot may see. M' = C * P.

    `rows` and `slots` are None when row r simply sits in slot r.
    """

    rows: Int[Array, " M'"] | None  # slot -> row; M where the slot is empty
    slots: Int[Array, " M"] | None  # row -> slot; M' past the last segment
    low: Int[Array, "C P"]  # first slot that this slot sees
    high: Int[Array, "C P"]  # last slot that it sees; -1: it sees nothing

    def key_blocks(self) -> tuple[Int[Array, " C"], Int[Array, " C"]]:
        """Return the first and last key block of every query block; last -1: none."""
        block = self.low.shape[1]
        used = self.high >= 0
        last = jnp.max(self.high, axis=1)
        first = jnp.min(jnp.where(used, self.low, self.low.size), axis=1)
        return first // block, jnp.where(last >= 0, last // block, -1)


def segment_layout(
    offsets: Int[Array, " S1"],
    num_rows: int,
    block: int,
    mask: Mask,
    bounds: tuple[Int[Array, " M"], Int[Array, " M"]] | None = None,
) -> Layout:
    """Return the layout of packed segments; each one starts a new block."""
    num_segments = offsets.shape[0] - 1
    offsets = offsets.astype(jnp.int32)
    lengths = jnp.diff(offsets)
    # First block of every segment, and their total, which is at most `num_blocks`.
    ends = jnp.cumsum(-(-lengths // block), dtype=jnp.int32)
    firsts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    num_blocks = max(1, (num_rows + num_segments * (block - 1)) // block)

    index = jnp.arange(num_blocks, dtype=jnp.int32)
    segment = jnp.searchsorted(firsts, index, side="right") - 1
    segment = jnp.clip(segment, 0, num_segments - 1)
    slot = jnp.arange(num_blocks * block, dtype=jnp.int32).reshape(num_blocks, block)
    start = (firsts[segment] * block)[:, None]
    place = slot - start  # of the slot inside its segment
    real = place < lengths[segment][:, None]
    rows = jnp.where(real, offsets[segment][:, None] + place, num_rows)
    end = start + lengths[segment][:, None] - 1
    low, high = visible_range(slot, start, end, mask)
    if bounds is not None:
        first, last = (x.at[rows].get(mode="clip") for x in bounds)
        low = jnp.maximum(low, slot - (rows - first))
        high = jnp.minimum(high, slot + (last - rows))

    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = jnp.searchsorted(offsets, row, side="right") - 1
    owner = jnp.clip(owner, 0, num_segments - 1)
    slots = firsts[owner] * block + row - offsets[owner]
    return Layout(
        rows=rows.reshape(-1),
        slots=jnp.where(row < offsets[-1], slots, slot.size),
        low=jnp.where(real, low, 0),
        high=jnp.where(real, high, -1),
    )


def visible_range(
    slot: jax.Array,
    start: jax.Array,
    end: jax.Array,
    mask: Mask,
) -> tuple[jax.Array, jax.Array]:
    """Return the first and last slot that each slot of a segment start..end sees."""
    low, high = start, end
    if mask.causal:
        high = slot
    if mask.window is not None:
        window = mask.window
        # Compared without slot + window, which could overflow.
        low = jnp.where(slot - low >= window, slot - (window - 1), low)
        high = jnp.where(high - slot >= window, slot + (window - 1), high)
    return jnp.broadcast_to(low, slot.shape), jnp.broadcast_to(high, slot.shape)


def to_blocks(x: Float[Array, "M ..."], layout: Layout) -> Float[Array, "C P ..."]:
    """Return the rows by blocks; empty slots are zero."""
    if layout.rows is not None:
        x = x.at[layout.rows].get(mode="fill", fill_value=0)
    return x.reshape(*layout.low.shape, *x.shape[1:])


def to_rows(
    blocks: Float[Array, "C2 P ..."],
    layout: Layout,
    places: Int[Array, " C"] | None,
) -> Float[Array, "M ..."]:
    """Return blocks by rows; block c is at `places[c]`. Rows without slot are zero."""
    flat = blocks.reshape(-1, *blocks.shape[2:])
    if layout.slots is None:
        return flat if places is None else blocks[places].reshape(-1, *flat.shape[1:])
    size, slots = layout.low.shape[1], layout.slots
    if places is not None:
        moved = places.at[slots // size].get(mode="clip") * size + slots % size
        slots = jnp.where(slots < layout.low.size, moved, flat.shape[0])
    return flat.at[slots].get(mode="fill", fill_value=0)
