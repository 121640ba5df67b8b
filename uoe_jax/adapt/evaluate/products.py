"""What happens where an adapted weight meets an input: one rule an operation.

Each rule returns the frozen result plus the deltas', by the cheapest path or by the
one that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uoe_jax.adapt.evaluate.cost import Site, cut_network, path_costs
from uoe_jax.adapt.evaluate.equation import unused_letters
from uoe_jax.adapt.evaluate.network import (
    Lazy,
    Term,
    Unsupported,
    axis_size,
    contract,
    delta,
    fuse,
    pad_widths,
    sum_parts,
)
from uoe_jax.errors import ConfigError
from uoe_jax.ops.grouped_matmul.api import (
    gather_project,
    grouped_matmul,
    project_scatter,
)
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows
from uoe_jax.varying import varying_axes

Bind = Callable[..., Array]


@dataclass
class Mode:
    """How an adapted function is evaluated: path, training, and the dropout key."""

    path: str = "auto"
    training: bool = False
    key: jax.Array | None = None
    sites: int = 0  # products so far: each has a dropout of its own

    def next_key(self) -> jax.Array | None:
        """Return the dropout key of the next product."""
        self.sites += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.sites)


def drops(term: Term, mode: Mode) -> bool:
    """Whether the term's input has dropout here, so that it can't be fused."""
    return term.dropout > 0 and mode.key is not None


def drop(x: Array, term: Term, mode: Mode) -> Array:
    """Return the adapter's input with dropout, where there is a key."""
    if not drops(term, mode):
        return x
    key = mode.next_key()
    assert key is not None
    if axes := varying_axes(x):  # devices hold other inputs: no two have one mask
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    keep = jax.random.bernoulli(key, 1.0 - term.dropout, x.shape)
    return jnp.where(keep, x / (1.0 - term.dropout), jnp.zeros_like(x))


def fuse_for(weight: Lazy, operation: str, mode: Mode) -> Array:
    """Return weight + deltas; ConfigError where an input should have had dropout."""
    for term in weight.terms:
        if drops(term, mode):
            raise ConfigError(
                f"{term.name} goes through {operation}, where adapters take no "
                "dropout; set dropout to 0 or leave that weight out of targets"
            )
    return fuse(weight)


def choose_path(term: Term, site: Site, mode: Mode) -> str:
    """Return the path of one product: the one asked for, else the cheapest."""
    dropped = drops(term, mode)
    if mode.path != "auto":
        return "delta" if dropped and mode.path == "fused" else mode.path
    costs = path_costs(site, training=mode.training)
    return costs.cheapest(allow_fused=not dropped)


@dataclass
class _Dot:
    """The letters of a `dot_general` between x and a term's weight."""

    x: str
    weight: str
    out: str
    split: list[int]  # shape of x with its summed axes split into letters
    sizes: dict[str, int]
    padded_in: int | None = None  # x axis whose outer entries meet zeros
    padded_out: int | None = None  # result axis of a piece of a concatenation


def _dot_letters(term: Term, x: Array, first: bool, numbers: Any) -> _Dot:
    """Return how x's axes pair with the term's letters."""
    (c0, c1), (b0, b1) = numbers
    wc, xc, wb, xb = (c0, c1, b0, b1) if first else (c1, c0, b1, b0)
    free = unused_letters("".join(term.labels) + "".join(term.axes), x.ndim)
    words = list(free)
    for w_axis, x_axis in zip((*wc, *wb), (*xc, *xb), strict=True):
        words[x_axis] = term.axes[w_axis]
    sizes = term.sizes | dict(zip(free, x.shape, strict=True))
    x_free = [words[i] for i in range(x.ndim) if i not in (*xc, *xb)]
    kept = [i for i in range(len(term.axes)) if i not in (*wc, *wb)]
    w_free = [term.axes[i] for i in kept]
    sides = (w_free, x_free) if first else (x_free, w_free)
    out = "".join([*(words[i] for i in xb), *sides[0], *sides[1]])
    padded_in = padded_out = None
    if term.pad is not None:
        axis = term.pad[0]
        if axis in wb:
            raise Unsupported
        if axis in wc:
            padded_in = xc[list(wc).index(axis)]
        else:
            padded_out = len(xb) + (0 if first else len(x_free)) + kept.index(axis)
    split = [sizes[a] for word in words for a in word]
    weight = "".join(term.axes)
    return _Dot("".join(words), weight, out, split, sizes, padded_in, padded_out)


def dot_general(
    weight: Lazy,
    x: Array,
    bind: Bind,
    mode: Mode,
    params: Mapping[str, Any],
    first: bool,
) -> Array:
    """Return `dot_general` of x and an adapted weight; `first`: the weight is lhs."""
    numbers = params["dimension_numbers"]
    terms = [(term, _dot_letters(term, x, first, numbers)) for term in weight.terms]
    fused, apart = [], []
    for term, dot in terms:
        itemsize = x.dtype.itemsize
        site = Site(dot.x, dot.weight, dot.out, term.labels, dot.sizes, itemsize)
        path = choose_path(term, site, mode)
        (fused if path == "fused" else apart).append((term, dot, path))
    value = fuse(Lazy(weight.value, tuple(t for t, _, _ in fused)))
    y = bind(*((value, x) if first else (x, value)))
    parts = [
        _dot_delta(term, dot, path, x, y, bind, mode, first)
        for term, dot, path in apart
    ]
    return y + sum_parts(parts) if parts else y


def _dot_delta(
    term: Term,
    dot: _Dot,
    path: str,
    x: Array,
    y: Array,
    bind: Bind,
    mode: Mode,
    first: bool,
) -> Array:
    x = drop(x, term, mode)
    if path == "delta":
        change = delta(term).astype(x.dtype)
        return bind(*((change, x) if first else (x, change)))
    if dot.padded_in is not None:
        assert term.pad is not None
        _, before, after = term.pad
        stop = x.shape[dot.padded_in] - after
        x = jax.lax.slice_in_dim(x, before, stop, axis=dot.padded_in)
    part = contract(
        (x.reshape(dot.split), *term.arrays),
        (dot.x, *term.labels),
        dot.out,
        dtype=x.dtype,
    )
    part = part.astype(y.dtype)
    if dot.padded_out is None:
        return part.reshape(y.shape)
    assert term.pad is not None
    axis, before, after = term.pad
    shape = list(y.shape)
    shape[dot.padded_out] = axis_size(term, term.axes[axis])
    widths = pad_widths((dot.padded_out, before, after), y.ndim)
    return jnp.pad(part.reshape(shape), widths)


def take_rows(
    weight: Lazy, indices: Array, bind: Bind, mode: Mode, params: Mapping[str, Any]
) -> Array:
    """Return rows `weight[indices]` of an adapted table (`gather` along one axis).

    Each factor that has the axis is looked up, the rest is a small product. Embeddings
    take no dropout, as in PEFT.
    """
    numbers = params["dimension_numbers"]
    shape, sizes = weight.shape, tuple(params["slice_sizes"])
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    cut = [i for i, n in enumerate(shape) if sizes[i] != n]
    plain = (
        axis >= 0
        and set(cut) <= {axis}
        and tuple(numbers.collapsed_slice_dims) == (axis,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims)
        == tuple(range(indices.ndim - 1, indices.ndim - 2 + len(shape)))
    )
    if not plain or mode.path in ("fused", "delta"):
        raise Unsupported
    y = bind(weight.value, indices)
    places, parts = indices[..., 0], []
    for term in weight.terms:
        word = term.axes[axis]
        if term.pad is not None or len(word) != 1:
            raise Unsupported
        new = unused_letters("".join(term.labels), places.ndim)
        arrays, labels = [], []
        for array, letters in zip(term.arrays, term.labels, strict=True):
            if word in letters:
                array = jnp.moveaxis(array, letters.index(word), 0)
                array = array.at[places].get(mode=params["mode"])
                letters = new + letters.replace(word, "")
            arrays.append(array)
            labels.append(letters)
        rest = [w for i, w in enumerate(term.axes) if i != axis]
        part = contract(arrays, labels, new + "".join(rest))
        parts.append(part.reshape(y.shape).astype(y.dtype))
    return y + sum_parts(parts)


def routed_product(
    weight: Lazy, x: Array, packing: Packing, bind: Bind, mode: Mode, operation: str
) -> Array:
    """Return a grouped product of routed rows with an adapted [E, I, O] weight.

    The delta is two grouped products over the same rows: experts that no token chose
    cost nothing, and no expert's delta is ever formed. `operation` is gather_project,
    project_scatter or grouped_matmul.
    """
    if mode.path in ("fused", "delta"):
        return bind(x, fuse_for(weight, operation, mode))
    y, parts = bind(x, weight.value), []
    for term in weight.terms:
        left, right, ins_pad, out_pad = _two_matrices(term, x.dtype)
        dropped = drop(x, term, mode)
        if ins_pad is not None:
            stop = x.shape[1] - ins_pad[1]
            dropped = jax.lax.slice_in_dim(dropped, ins_pad[0], stop, axis=1)
        if operation == "gather_project":
            part = _project(_gather(dropped, left, packing), right, packing)
        else:
            rows = _project(dropped, left, packing)
            if operation == "project_scatter":
                part = _scatter(rows, right, packing)
            else:
                part = _project(rows, right, packing)
        if out_pad is not None:
            part = jnp.pad(part, [(0, 0), out_pad])
        parts.append(part.astype(y.dtype))
    return y + sum_parts(parts)


def _two_matrices(term: Term, dtype: Any) -> tuple[Array, Array, Any, Any]:
    """Return the delta of [E, I, O] as [E?, I, R] and [E?, R, O], and its paddings."""
    term = _without_ones(term)
    expert, ins, outs = term.axes
    pads: list[Any] = [None, None, None]
    if term.pad is not None:
        pads[term.pad[0]] = term.pad[1:]
    if len(expert) != 1 or pads[0] is not None:
        raise Unsupported
    sizes = term.sizes
    left, right, cut = cut_network(term.labels, ins, outs, sizes)
    if not left or not right:
        raise Unsupported
    cut = cut.replace(expert, "")

    def matrix(side: list[int], rows: str, columns: str) -> Array:
        arrays, labels = [term.arrays[i] for i in side], [term.labels[i] for i in side]
        lead = expert if any(expert in word for word in labels) else ""
        value = contract(arrays, labels, lead + rows + columns, dtype=jnp.float32)
        shape = [math.prod(sizes[a] for a in word) for word in (rows, columns)]
        return value.reshape([sizes[a] for a in lead] + shape).astype(dtype)

    return matrix(left, ins, cut), matrix(right, cut, outs), pads[1], pads[2]


def _without_ones(term: Term) -> Term:
    """Return the term without its letters of size 1: they may lie on either side."""
    sizes = term.sizes
    keep = lambda word: "".join(a for a in word if sizes[a] > 1)
    labels = tuple(keep(word) for word in term.labels)
    arrays = tuple(
        array.reshape([sizes[a] for a in word])
        for array, word in zip(term.arrays, labels, strict=True)
    )
    axes = tuple(keep(word) for word in term.axes)
    return term.replace(arrays=arrays, labels=labels, axes=axes)


def _gather(x: Array, matrix: Array, packing: Packing) -> Array:
    if matrix.ndim == 2:  # shared by the experts: project each token once
        return gather_rows(jnp.dot(x, matrix), packing)
    return gather_project(x, matrix, packing)


def _project(rows: Array, matrix: Array, packing: Packing) -> Array:
    if matrix.ndim == 2:
        return jnp.dot(rows, matrix)
    return grouped_matmul(rows, matrix, packing.group_offsets)


def _scatter(rows: Array, matrix: Array, packing: Packing) -> Array:
    if matrix.ndim == 2:
        return jnp.dot(combine_rows(rows, packing), matrix)
    return project_scatter(rows, matrix, packing)
