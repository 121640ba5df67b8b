"""Convolutions with an adapted kernel: the factored path keeps stride and dilation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uoe_jax.adapt.evaluate.cost import FLOPS_PER_BYTE, weigh_paths
from uoe_jax.adapt.evaluate.equation import plan_contraction
from uoe_jax.adapt.evaluate.network import (
    Lazy,
    Term,
    Unsupported,
    contract,
    delta,
    fuse,
    sum_parts,
)
from uoe_jax.adapt.evaluate.products import Bind, Mode, drop, drops


def convolve(
    weight: Lazy, x: Array, bind: Bind, mode: Mode, params: Mapping[str, Any]
) -> Array:
    """Return `conv_general_dilated` of x and an adapted kernel.

    Factored is a 1x1 convolution with the input factor, a small k x k one with the
    core and the spatial factors, which has the stride, padding, dilation and groups,
    and a 1x1 with the output factor.
    """
    fused, apart = [], []
    for term in weight.terms:
        path = _choose(term, x, mode, params)
        (fused if path == "fused" else apart).append((term, path))
    y = bind(x, fuse(Lazy(weight.value, tuple(t for t, _ in fused))))
    parts = []
    for term, path in apart:
        dropped = drop(x, term, mode)
        if path == "delta":
            part = bind(dropped, delta(term).astype(x.dtype))
        else:
            part = _factored(term, dropped, params)
        parts.append(part.astype(y.dtype))
    return y + sum_parts(parts) if parts else y


def _spec(term: Term, params: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the kernel's output, input and spatial letters."""
    if term.pad is not None or any(len(word) != 1 for word in term.axes):
        raise Unsupported
    if params["batch_group_count"] != 1:
        raise Unsupported
    out, inner, *space = params["dimension_numbers"].rhs_spec
    return term.axes[out], term.axes[inner], "".join(term.axes[i] for i in space)


def _sides(
    term: Term, out: str, inner: str, space: str
) -> tuple[int | None, int | None]:
    """Return the numbers of the pure input factor and of the pure output factor."""
    left = right = None
    for number, word in enumerate(term.labels):
        others = set(word) & set(out + inner + space)
        if len(word) == 2 and others == {inner}:
            left = number
        elif len(word) == 2 and others == {out}:
            right = number
    return left, right


def _choose(term: Term, x: Array, mode: Mode, params: Mapping[str, Any]) -> str:
    """Return the path of one convolution: the one asked for, else the cheapest."""
    dropped = drops(term, mode)
    if mode.path != "auto":
        return "delta" if dropped and mode.path == "fused" else mode.path
    out, inner, space = _spec(term, params)
    sizes, groups = term.sizes, params["feature_group_count"]
    left, right = _sides(term, out, inner, space)
    rank_in, rank_out = _rank(term, left, inner), _rank(term, right, out)
    lhs = params["dimension_numbers"].lhs_spec
    points = math.prod(x.shape[i] for i in (lhs[0], *lhs[2:]))
    numel = math.prod(sizes[word] for word in term.axes)
    taps = numel // (sizes[out] * sizes[inner])
    middle = sizes[rank_in] * groups * sizes[rank_out] * taps
    sides = 0
    if left is not None:
        sides += groups * sizes[inner] * sizes[rank_in]
    if right is not None:
        sides += sizes[out] * sizes[rank_out]
    ranks = groups * (sizes[rank_in] + sizes[rank_out])
    # Read x, write and read what lies between, then the result is added to another.
    moved = groups * sizes[inner] + 2 * ranks + 3 * sizes[out]
    traffic = moved * x.dtype.itemsize * FLOPS_PER_BYTE
    costs = weigh_paths(
        build=plan_contraction(term.labels, "".join(term.axes), sizes).flops,
        product=2 * points * numel,
        weight_bytes=numel * x.dtype.itemsize,
        factored=points * (2 * (middle + sides) + traffic),
        training=mode.training,
    )
    return costs.cheapest(allow_fused=not dropped)


def _rank(term: Term, number: int | None, letter: str) -> str:
    """Return the rank letter of a side factor, or the axis itself without one."""
    return letter if number is None else term.labels[number].replace(letter, "")


def _factored(term: Term, x: Array, params: Mapping[str, Any]) -> Array:
    """Return the delta's convolution as three small ones."""
    out, inner, space = _spec(term, params)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    left, right = _sides(term, out, inner, space)
    rank_in, rank_out = _rank(term, left, inner), _rank(term, right, out)
    middle = [n for n in range(len(term.labels)) if n not in (left, right)]
    kernel = contract(
        [term.arrays[n] for n in middle],
        [term.labels[n] for n in middle],
        space + rank_in + rank_out,
        dtype=jnp.float32,
    ).astype(x.dtype)
    # Channels last, groups apart: the same factors serve every group.
    lhs = numbers.lhs_spec
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    if left is not None:
        x = x.reshape(*x.shape[:-1], groups, -1)
        matrix = _matrix(term, left, inner + rank_in).astype(x.dtype)
        x = jnp.einsum("...gi,iR->...gR", x, matrix)
        x = x.reshape(*x.shape[:-2], -1)
    if right is not None:
        kernel = jnp.tile(kernel, (1,) * (kernel.ndim - 1) + (groups,))
    letters = "XYZ"[: len(space)]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        precision=params["precision"],
    )
    if right is not None:
        y = y.reshape(*y.shape[:-1], groups, -1)
        matrix = _matrix(term, right, out + rank_out).astype(y.dtype)
        matrix = matrix.reshape(groups, -1, y.shape[-1])
        y = jnp.einsum("...gR,goR->...go", y, matrix)
        y = y.reshape(*y.shape[:-2], -1)
    # From batch, space, channels to where the model wants them.
    batch, channels, *spatial = numbers.out_spec
    return jnp.moveaxis(y, range(y.ndim), (batch, *spatial, channels))


def _matrix(term: Term, number: int, letters: str) -> Array:
    return jnp.einsum(f"{term.labels[number]}->{letters}", term.arrays[number])
