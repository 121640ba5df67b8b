"""From entries to a device's problem."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.linalg.completion.build import make_buckets, make_segments
from uoe_jax.linalg.completion.entries import Entries
from uoe_jax.linalg.completion.layout import Bucket, Problem, Segments, fill

# A step's gathered rows should stay in a core's cache, or fill a large device.
BLOCK_BYTES = {"cpu": 2 << 20, "gpu": 512 << 20, "tpu": 128 << 20}

filled = jax.jit(fill, static_argnums=3)


@dataclass(frozen=True)
class Layout:
    """Places of a matrix's entries, for both sides."""

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
) -> Layout:
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
    return Layout(row_side, col_side, entries.shape, entries.size)


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
