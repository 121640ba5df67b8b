"""Degree buckets and sorted runs: where each equation of a side sits.

Buckets put problems of similar degree into rectangles, so that a device sees batched
matrix products; their widths are those that pad least, for few compilations.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

MAX_BUCKETS = 6


def round_up(size: Any) -> Any:
    """Return sizes at most 1/16 larger, and few different ones.

    Similar problems (the folds of a cross-validation) then share compiled code.
    """
    bits = np.frexp(np.asarray(size, np.float64))[1]
    grain = 2 ** np.maximum(bits - 5, 0)
    return -(-size // grain) * grain


def choose_widths(
    degree: np.ndarray, max_buckets: int = MAX_BUCKETS, worth: float = 0.0
) -> list[int]:
    """Return the bucket widths with least padding, by dynamic programming.

    Of fewer than `max_buckets`, the first number that one more bucket would not lower
    by the fraction `worth`.
    """
    degree = degree[degree > 0]
    if not degree.size:
        return []
    rounded = round_up(-(-degree // 4) * 4)
    candidates, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    num = len(candidates)
    cost = np.full((max_buckets + 1, num + 1), np.inf)
    cost[:, 0] = 0.0
    previous = np.zeros((max_buckets + 1, num + 1), int)
    for used in range(1, max_buckets + 1):
        for end in range(1, num + 1):
            area = (below[end] - below[:end]) * float(candidates[end - 1])
            total = cost[used - 1, :end] + area
            previous[used, end] = int(np.argmin(total))
            cost[used, end] = total.min()
    saved = 1 - cost[2:, num] / cost[1:-1, num]
    first = 1 + int(np.argmax(np.append(saved <= worth, True)))
    widths, end = [], num
    for used in range(first, 0, -1):
        if end == 0:
            break
        widths.append(int(candidates[end - 1]))
        end = int(previous[used, end])
    return sorted(widths)


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


def _sorted_order(library: Any, unknown: Any, index: Any, num_index: int) -> Any:
    if library is np:
        return np.argsort(unknown.astype(np.int64) * num_index + index)
    iota = jax.lax.iota(jnp.int32, unknown.shape[0])
    return jax.lax.sort((unknown, index, iota), num_keys=2)[2]


def _degree(library: Any, unknown: Any, num_unknown: int) -> np.ndarray:
    if library is np:
        return np.bincount(unknown, minlength=num_unknown)
    return np.asarray(jnp.bincount(unknown, length=num_unknown))


def make_buckets(
    unknown: Any,
    index: Any,
    num_unknown: int,
    num_index: int,
    *,
    block_entries: int,
    shards: int = 1,
) -> tuple[Bucket, ...]:
    """Return the degree buckets of a side; unknowns without entries are left out.

    Args:
      unknown: unknown of each entry, numpy or jax.
      index: row of the fixed factor of each entry.
      num_unknown: number of unknowns.
      num_index: number of rows of the fixed factor.
      block_entries: how many (padded) entries one step of a solver holds at once.
      shards: the number of steps of each bucket is a multiple of this.
    """
    library = np if isinstance(unknown, np.ndarray) else jnp
    size = int(unknown.shape[0])
    place = partial(_place, np) if library is np else _place_on_device
    degree = _degree(library, unknown, num_unknown).astype(np.int32)
    first = np.concatenate([[0], np.cumsum(degree)[:-1]]).astype(np.int32)
    order = _sorted_order(library, unknown, index, num_index).astype(np.int32)
    buckets, below = [], 0
    # Each bucket is compiled by itself: a small problem can't earn that back.
    most, worth = (2, 0.25) if size < 500_000 else (MAX_BUCKETS, 0.05)
    for width in choose_widths(degree, most, worth):
        ids = np.flatnonzero((degree > below) & (degree <= width)).astype(np.int32)
        below = width
        chunk = max(1, block_entries // width)
        steps = -(-max(len(ids), 1) // chunk)
        steps = -(-steps // shards) * shards
        chunk = int(round_up(-(-len(ids) // steps)))
        pad = steps * chunk - len(ids)
        start, count = (
            np.pad(x[ids], (0, pad)).reshape(steps, chunk) for x in (first, degree)
        )
        picked, entry = place(order, index, start, count, width, num_index)
        ids = np.pad(ids, (0, pad), constant_values=num_unknown)
        arrays = (ids.reshape(steps, chunk), picked, entry)
        buckets.append(Bucket(*map(jnp.asarray, arrays)))
    return tuple(buckets)


def _place(
    library: Any,
    order: Any,
    index: Any,
    first: Any,
    count: Any,
    width: int,
    num_index: int,
) -> tuple[Any, Any]:
    """Return each equation's row of the fixed factor and entry, padded at the end."""
    slot = library.arange(width, dtype=np.int32)[None, None, :]
    valid = slot < count[..., None]
    entry = order[library.where(valid, first[..., None] + slot, 0)]
    picked = library.where(valid, index[entry], np.int32(num_index))
    return picked, library.where(valid, entry, np.int32(order.shape[0]))


_place_on_device = jax.jit(partial(_place, jnp), static_argnums=(4, 5))


def make_segments(
    unknown: Any, index: Any, num_unknown: int, num_index: int, *, shards: int = 1
) -> Segments:
    """Return a side's entries as one run sorted by unknown, padded at the end."""
    library = np if isinstance(unknown, np.ndarray) else jnp
    size = int(unknown.shape[0])
    order = _sorted_order(library, unknown, index, num_index).astype(np.int32)
    pad = (0, -(-int(round_up(size)) // shards) * shards - size)
    arrays = (
        (unknown[order], num_unknown),
        (index[order], num_index),
        (order, size),
    )
    return Segments(
        *(
            jnp.asarray(library.pad(x, pad, constant_values=fill)).reshape(shards, -1)
            for x, fill in arrays
        )
    )
