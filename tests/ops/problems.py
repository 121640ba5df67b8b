"""Calls of the operations with their exact answers: what tests/ops/suite.py asks.

Seed 0 has an empty segment, one of one row, one over several tiles, and rows of none;
others are drawn. Rows past the last segment are NaN where a call is `spoilt`: there is
nothing to be read, and nothing that they reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops import ops_oracle
from uoe_jax.ops import pack_choices


class Problem(NamedTuple):
    """A call and what it must give."""

    arrays: tuple  # what it is differentiated in
    rest: tuple  # whole numbers beside them
    grad: Any  # of its result
    want: list  # its results, then the gradients of the arrays, in float64
    counted: int | None = None  # from this row on results and gradients are zero
    sizes: list | None = None  # largest terms of what is wanted; None: itself


def draw(rng, dtype, *shapes):
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes]


def cut(rng, seed, rows, count):
    """First rows of `count` segments and the end of the last."""
    if seed:
        return [0, *np.sort(rng.integers(0, rows + 1, count))]
    start, end = rows // 8, rows * 9 // 10
    ends = [start, start, start + 1, *[end] * (count - 3)] if count > 3 else []
    return [0, *(ends or [start, start, end])]


def spoil(arrays, end, spoilt):
    """The arrays, NaN from row `end` on."""
    arrays = [np.array(a) for a in arrays]
    for a in arrays if spoilt else []:
        a[end:] = np.nan
    return arrays


def segments(seed, dtype, spoilt, *, rows, count, groups, width, mask, **options):
    rng = np.random.default_rng(seed)
    offsets = cut(rng, seed, rows, count)
    shapes = (rows, groups, width), (rows, width), (rows, width), (rows, groups, width)
    arrays = draw(rng, dtype, *shapes)
    sink = draw(rng, dtype, (rows, groups)) if options.get("sink") else []
    visible = ops_oracle.segment_visible(offsets, rows, *mask)
    bounds = None
    if options.get("documents"):  # that end inside the segments, too
        edges = np.unique([0, *offsets, *rng.integers(1, rows, 9), rows])
        run = np.searchsorted(edges, np.arange(rows), side="right") - 1
        bounds = edges[run].astype(np.int32), (edges[run + 1] - 1).astype(np.int32)
        visible &= run[:, None] == run
    factor = options.get("scale", width**-0.5)
    want = ops_oracle.attention(*arrays, visible, factor, *sink)
    *arrays, grad = arrays[:3] + sink + arrays[3:]
    *arrays, grad = spoil([*arrays, grad], offsets[-1], spoilt)
    rest = np.asarray(offsets, np.int32), bounds
    return Problem(tuple(arrays), rest, grad, list(want), offsets[-1])


def groups(seed, dtype, spoilt, *, rows, count, inner, outer):
    rng = np.random.default_rng(seed)
    offsets = cut(rng, seed, rows, count)
    x, w, grad = draw(rng, dtype, (rows, inner), (count, inner, outer), (rows, outer))
    want = ops_oracle.grouped(x, w, offsets, grad)
    x, grad = spoil((x, grad), offsets[-1], spoilt)
    rest = (np.asarray(offsets, np.int32),)
    return Problem((x, w), rest, grad, list(want))


def pack(rng, seed, tokens, experts, **sizes):
    """A packing of two samples, and [M, N]: which of its rows in groups is which token.

    A share of the picks is kept.
    """
    picks, num_rows = sizes.get("picks", 2), sizes.get("num_rows")
    scores = rng.random((2, tokens, experts))
    scores += np.arange(experts) / (3 if seed else 1)  # all may pick the same
    choices = np.argsort(scores, axis=-1)[..., :picks].astype(np.int32)
    kept = rng.permutation(choices.size) < round(sizes.get("kept", 1.0) * choices.size)
    with jax.enable_x64(False):
        packing = pack_choices(
            jnp.asarray(choices),
            experts,
            jnp.asarray(kept.reshape(choices.shape)) if "kept" in sizes else None,
            num_rows,
        )
    packing = jax.tree.map(np.asarray, packing)
    end = packing.group_offsets[-1]
    matrix = np.zeros((packing.token_ids.shape[0], 2 * tokens))
    matrix[np.arange(end), packing.token_ids[:end]] = 1
    return packing, matrix


def packed(seed, dtype, spoilt, *, op, tokens, experts, inner, outer, **sizes):
    """Of `gather_project` or `project_scatter`."""
    rng = np.random.default_rng(seed)
    packing, matrix = pack(rng, seed, tokens, experts, **sizes)
    offsets, rows = packing.group_offsets, packing.token_ids.shape[0]
    end = offsets[-1]
    wide = lambda a: np.asarray(a, np.float64)
    sides = (2 * tokens, rows) if op == "gather_project" else (rows, 2 * tokens)
    shapes = (sides[0], inner), (experts, inner, outer), (sides[1], outer)
    x, w, grad = draw(rng, dtype, *shapes)
    if op == "gather_project":
        out, dx, dw = ops_oracle.grouped(matrix @ wide(x), w, offsets, grad)
        want = [out, matrix.T @ dx, dw]
        (grad,) = spoil([grad], end, spoilt)
    else:
        out, dx, dw = ops_oracle.grouped(x, w, offsets, matrix @ wide(grad))
        want = [matrix.T @ out, dx, dw]
        (x,) = spoil([x], end, spoilt)
    return Problem((x, w), (packing,), grad, want)


def experts(seed, dtype, spoilt, *, tokens, experts, width, hidden, **sizes):
    rng = np.random.default_rng(seed)
    packing, matrix = pack(rng, seed, tokens, experts, **sizes)
    shapes = (2 * tokens, width), (experts, width, hidden), (experts, hidden, width)
    x, w_up, w_down, grad = draw(rng, dtype, *shapes, (2 * tokens, width))
    # Values of about one in every step, as trained weights give.
    w_up, w_down = w_up / width**0.5, w_down / hidden**0.5
    w_up, w_down = (w.astype(x.dtype) for w in (w_up, w_down))
    (factors,) = draw(rng, np.promote_types(dtype, np.float32), (len(matrix),))
    offsets = packing.group_offsets
    want = ops_oracle.expert_mlp(x, w_up, w_down, factors, grad, matrix, offsets)
    (factors,) = spoil([factors], offsets[-1], spoilt)
    return Problem((x, w_up, w_down, factors), (packing,), grad, list(want))


def dense(seed, dtype, spoilt, *, length, width, mask, documents=False, **sizes):
    batch, heads, kv_heads = (
        sizes.get(name, usual)
        for name, usual in (("batch", 2), ("heads", 4), ("kv_heads", 2))
    )
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = draw(rng, dtype, *shapes)
    # Runs of random ids, some of one token; an id that comes back is another document.
    ids = rng.integers(0, 3, (batch, length // 5 + 1)).repeat(5, axis=1)[:, :length]
    ids[:, 7] = 9
    segments = ids.astype(np.int32) if documents else None
    sink = draw(rng, dtype, (heads,)) if sizes.get("sink") else []
    runs = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    visible = ops_oracle.segment_visible([0, length], length, *mask)
    want = [np.zeros(a.shape) for a in (arrays[0], *arrays[:3], *sink)]
    for b in range(batch):
        seen = visible & (runs[b][:, None] == runs[b]) if documents else visible
        for kv in range(kv_heads):
            own = slice(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
            places = own, kv, kv, own
            one = [a[b, :, at] for a, at in zip(arrays, places, strict=True)]
            rows = [np.broadcast_to(a[own], (length, heads // kv_heads)) for a in sink]
            parts = ops_oracle.attention(*one, seen, width**-0.5, *rows)
            places = own, own, kv, kv
            for whole, part, at in zip(want, parts, places, strict=False):
                whole[b, :, at] = part
            if sink:
                want[-1][own] += parts[-1].sum(axis=0)
    # A head's sink has the gradients of all its rows.
    terms = [*want[:4], *(np.full(heads, batch * length / 4) for _ in sink)]
    arrays, grad = (*arrays[:3], *sink), arrays[3]
    return Problem(arrays, (segments,), grad, want, sizes=terms)


def lists(seed, dtype, spoilt, *, rows, count, keys, groups, width):
    rng = np.random.default_rng(seed)
    offsets = np.asarray(cut(rng, seed, rows, count), np.int32)
    lists = (count, keys, width)
    shapes = (rows, groups, width), lists, lists, (rows, groups, width)
    q, k, v, grad = draw(rng, dtype, *shapes)
    # As tokens of a causal model, some that see a part and some that see nothing.
    last = rng.integers(-1, keys, rows)
    first = np.where(rng.random(rows) < 0.3, last // 2, 0)
    own = np.searchsorted(offsets[1:], np.arange(rows), side="right")
    at = np.arange(count * keys)
    visible = (own[:, None] == at // keys) & (at % keys >= first[:, None])
    visible &= at % keys <= last[:, None]
    flat = (a.reshape(-1, width) for a in (k, v))
    want = ops_oracle.attention(q, *flat, grad, visible, width**-0.5)
    want = [part.reshape(a.shape) for part, a in zip(want, (q, q, k, v), strict=True)]
    q, grad = spoil((q, grad), offsets[-1], spoilt)
    rest = offsets, first.astype(np.int32), last.astype(np.int32)
    return Problem((q, k, v), rest, grad, want)


def swiglu(seed, dtype, spoilt, *, rows, width):
    rows, factors, grad = ops_oracle.draw_swiglu(seed, rows, width, dtype)
    want = ops_oracle.swiglu(rows, factors, grad)
    unscaled = ops_oracle.swiglu(rows, np.ones(len(rows)), grad)[0]
    # Sums may cancel: their error is that of the terms, in float32 or wider.
    terms = np.abs(unscaled * np.asarray(grad, np.float64)).sum(axis=1)
    return Problem((rows, factors), (), grad, list(want), sizes=[*want[:2], terms])


def heads(seed, dtype, spoilt, *, rows, width, tokens=11, **options):
    shape = tokens, rows, options["kv_heads"], options["groups"], width
    rows, positions, ids, grads = ops_oracle.draw_heads(seed, *shape, dtype)
    want = ops_oracle.split_heads(rows, positions, ids, grads, **options)
    return Problem((rows,), (positions, ids), grads, list(want))
