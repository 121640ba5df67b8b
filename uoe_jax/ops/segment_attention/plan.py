"""Which query block meets which key block, and when.

Query blocks are sorted by the number of key blocks they need and cut into chunks. All
blocks of a chunk take one step together, a key block each, and a chunk takes as many
steps as its first block needs: short and long segments don't wait for each other. No
two blocks meet the same key block in the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.segment_attention.layout import Layout

# The score of an unseen key and the logsumexp of a row that sees none; finite, so that
# neither makes nan.
MASKED = -1e30


class Plan(NamedTuple):
    """Query blocks in chunks of C; padded entries need no key block."""

    order: Int[Array, "chunks C"]  # block numbers
    first: Int[Array, "chunks C"]  # key blocks needed
    last: Int[Array, "chunks C"]
    places: Int[Array, " blocks"]  # block -> its place in the flattened order


def make_plan(layout: Layout, chunk: int) -> Plan:
    """Return the chunks of a layout's query blocks."""
    first, last = layout.key_blocks()
    order = jnp.argsort(first - last, stable=True)  # most key blocks first
    pad = -order.shape[0] % chunk

    def cut(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(x, (0, pad), constant_values=fill).reshape(-1, chunk)

    places = jnp.argsort(order)
    return Plan(cut(order, 0), cut(first[order], 0), cut(last[order], -1), places)


class Chunk(NamedTuple):
    """Query blocks that step together; R = P * G score rows a block."""

    ids: Int[Array, " C"]
    first: Int[Array, " C"]
    last: Int[Array, " C"]
    low: Int[Array, "C R 1"]
    high: Int[Array, "C R 1"]
    q: Float[Array, "C R H"]

    def num_steps(self, cyclic: bool) -> Int[Array, ""]:
        """Return the steps after which every block has met its key blocks."""
        if cyclic:
            return jnp.max(self.last - self.first) + 1
        down = jnp.max(jnp.where(self._used(), self.ids - self.first, -1))
        return self._up() + down + 1

    def key_block(
        self, step: Int[Array, ""], cyclic: bool
    ) -> tuple[Int[Array, " C"], Bool[Array, " C"]]:
        """Return the key block that each block meets, and whether it needs it.

        The own block comes first, so that a running maximum is finite from the start.
        Cyclic: blocks that share a key block need all the same ones, and take turns.
        """
        if cyclic:
            count = self.last - self.first + 1
            turn = jnp.mod(self.ids - self.first - step, jnp.maximum(count, 1))
            return self.first + turn, step < count
        up = self._up()
        block = self.ids + jnp.where(step <= up, step, up - step)
        return block, (block >= self.first) & (block <= self.last)

    def scores(
        self,
        keys: Float[Array, "C P H"],
        block: Int[Array, " C"],
        needed: Bool[Array, " C"],
        scale: float,
    ) -> Float[Array, "C R P"]:
        """Return the scores against one key block each, `MASKED` where unseen."""
        size = keys.shape[1]
        slot = block[:, None] * size + jnp.arange(size, dtype=block.dtype)[None]
        slot = jnp.where(needed[:, None], slot, jnp.iinfo(slot.dtype).max)[:, None, :]
        s = contract("crh,cph->crp", self.q, keys) * scale
        return jnp.where((slot >= self.low) & (slot <= self.high), s, MASKED)

    def _used(self) -> Bool[Array, " C"]:
        return self.last >= self.first

    def _up(self) -> Int[Array, ""]:
        return jnp.max(jnp.where(self._used(), self.last - self.ids, 0))


def take_chunk(
    plan: Plan, index: Int[Array, ""], q: Float[Array, "blocks R H"], layout: Layout
) -> Chunk:
    """Return one chunk with its queries and what their rows see."""
    ids = plan.order[index]
    groups = q.shape[1] // layout.low.shape[1]
    low, high = (
        jnp.repeat(x[ids], groups, axis=1)[:, :, None]
        for x in (layout.low, layout.high)
    )
    return Chunk(ids, plan.first[index], plan.last[index], low, high, q[ids])


def contract(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return an einsum summed in float32 or wider."""
    dtype = accumulator_dtype(x.dtype)
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)
