"""The least-squares problems of both sides of a matrix, and the state that solves them.

One side of the matrix is a set of independent problems, one for each unknown vector;
its entries are the problem's equations, in degree buckets or as one sorted run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uoe_jax.linalg.completion.buckets import (
    Bucket,
    Segments,
    make_buckets,
    make_segments,
)
from uoe_jax.linalg.completion.entries import Entries


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


class State(NamedTuple):
    """Factors and biases; the model is offset + row_bias + col_bias + u v^T."""

    u: Float[Array, "M R"]
    v: Float[Array, "N R"]
    row_bias: Float[Array, " M"]
    col_bias: Float[Array, " N"]


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


# A step's gathered rows should stay in a core's cache, or fill a large device.
BLOCK_BYTES = {"cpu": 2 << 20, "gpu": 512 << 20, "tpu": 128 << 20}

filled = jax.jit(fill, static_argnums=3)


@dataclass(frozen=True)
class EntryLayout:
    """Where each entry of a matrix sits among the equations of both its sides."""

    rows: tuple[Bucket, ...] | Segments
    cols: tuple[Bucket, ...] | Segments
    shape: tuple[int, int]
    size: int

    @functools.cached_property
    def counts(self) -> tuple[list[tuple[int, int, int]], ...]:
        """For columns, then rows: (width, entries, unknowns) of each bucket."""
        m, n = self.shape
        return _counts(self.cols, n, m), _counts(self.rows, m, n)

    def problem(self, values: Any, weights: Any, offset: Any) -> Problem:
        """Return the problem with these values (one for each entry) and weights."""
        centred = jnp.asarray(values) - offset
        weights = None if weights is None else jnp.asarray(weights)
        return Problem(
            filled(self.rows, centred, weights, self.shape[0]),
            filled(self.cols, centred, weights, self.shape[1]),
            jnp.asarray(offset, centred.dtype),
        )


def lay_out(
    entries: Entries,
    rank: int,
    *,
    kernel: str = "bucket",
    shards: int = 1,
    block_bytes: int | None = None,
) -> EntryLayout:
    """Return where `entries` go, for factors of width `rank`.

    Args:
      entries: clean entries, numpy or jax.
      rank: width of the factors, bias column included.
      kernel: "bucket" or "segment".
      shards: devices that share the problems.
      block_bytes: gathered rows a device holds at once; None: by platform.
    """
    if block_bytes is None:
        block_bytes = BLOCK_BYTES.get(jax.default_backend(), 128 << 20)
    itemsize = np.dtype(entries.values.dtype).itemsize
    block_entries = max(1, block_bytes // (rank * itemsize))
    rows, cols, (m, n) = entries.rows, entries.cols, entries.shape
    if kernel == "segment":
        row_side = make_segments(rows, cols, m, n, shards=shards)
        col_side = make_segments(cols, rows, n, m, shards=shards)
    else:
        build = partial(make_buckets, block_entries=block_entries, shards=shards)
        row_side, col_side = build(rows, cols, m, n), build(cols, rows, n, m)
    return EntryLayout(row_side, col_side, entries.shape, entries.size)


def _counts(
    side: tuple[Bucket, ...] | Segments, unknowns: int, fixed: int
) -> list[tuple[int, int, int]]:
    """Return (width, entries, unknowns) of each bucket."""
    if isinstance(side, Segments):
        entries = int((side.index < fixed).sum())
        known = len(np.unique(np.asarray(side.unknown).ravel()[:entries]))
        return [(0, entries, known)]
    return [
        (
            bucket.index.shape[2],
            int((bucket.index < fixed).sum()),
            int((bucket.ids < unknowns).sum()),
        )
        for bucket in side
    ]
