"""Where each observed entry sits: degree buckets, or runs sorted by unknown.

One side of the matrix is a set of independent least-squares problems, one for each
unknown vector; its entries are the problem's equations. Buckets put problems of similar
degree into rectangles, so that a device sees batched matrix products; the widths are
those that pad least. Segments keep the entries as one sorted run, with no padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Bucket(NamedTuple):
    """Problems of similar degree; padding points one past the end."""

    ids: Int[Array, "P C"]  # unknown of each problem
    index: Int[Array, "P C S"]  # row of the fixed factor in each equation
    entry: Int[Array, "P C S"]  # position of its value


class Segments(NamedTuple):
    """All equations of a side, sorted by unknown."""

    unknown: Int[Array, "P C"]
    index: Int[Array, "P C"]
    entry: Int[Array, "P C"]


class Block(NamedTuple):
    """A bucket with its values filled in."""

    ids: Int[Array, "P C"]
    index: Int[Array, "P C S"]
    values: Float[Array, "P C S"]
    weights: Float[Array, "P C S"] | None


class Run(NamedTuple):
    """Segments with their values filled in."""

    unknown: Int[Array, "P C"]
    index: Int[Array, "P C"]
    values: Float[Array, "P C"]
    weights: Float[Array, "P C"] | None

    def flat(self) -> tuple[Array, Array, Array, Array | None]:
        """Return unknown, index, values and weights without the split into shards."""
        weights = None if self.weights is None else self.weights.reshape(-1)
        parts = (self.unknown, self.index, self.values)
        unknown, index, values = (x.reshape(-1) for x in parts)
        return unknown, index, values, weights


class Side(NamedTuple):
    """The equations of one side: filled buckets, or one run."""

    blocks: tuple[Block, ...] | Run
    degree: Float[Array, " N"]  # summed weight of each unknown's entries


class Problem(NamedTuple):
    """Both sides of a matrix and the offset taken from its values."""

    rows: Side  # unknowns are rows, the fixed factor is the columns'
    cols: Side
    offset: Float[Array, ""]


def fill(
    layout: tuple[Bucket, ...] | Segments,
    values: Float[Array, " X"],
    weights: Float[Array, " X"] | None,
    num_unknown: int,
) -> Side:
    """Return a side with `values` (and weights) at their places; differentiable."""

    def at(array: Array, entry: Array) -> Array:
        return array.at[entry].get(mode="fill", fill_value=0)

    # Entries past the end must have weight zero, so ones are written out as weights.
    ones = jnp.ones_like(values) if weights is None else weights
    degree = jnp.zeros(num_unknown, values.dtype)
    if isinstance(layout, Segments):
        degree = degree.at[layout.unknown].add(at(ones, layout.entry), mode="drop")
        run = Run(
            layout.unknown,
            layout.index,
            at(values, layout.entry),
            None if weights is None else at(weights, layout.entry),
        )
        return Side(run, degree)
    blocks = []
    for bucket in layout:
        total = at(ones, bucket.entry).sum(-1)
        degree = degree.at[bucket.ids].add(total, mode="drop")
        weight = None if weights is None else at(weights, bucket.entry)
        blocks.append(Block(bucket.ids, bucket.index, at(values, bucket.entry), weight))
    return Side(tuple(blocks), degree)
