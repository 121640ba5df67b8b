"""A weight's delta as an unevaluated network of factors, carried along with it.

A `Term` says which einsum of its arrays is the delta, and which letters make up each
axis of the weight as it stands now: reshapes and transposes of the weight only change
those words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uoe_jax.adapt.evaluate.equation import plan_contraction
from uoe_jax.varying import vary_together

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Term:
    """One delta: `einsum(arrays by labels) -> axes`, zeros around it along one axis."""

    arrays: tuple[Array, ...]
    labels: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    # (axis, zeros before, zeros after): its place in a concatenation.
    pad: tuple[int, int, int] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    name: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every letter."""
        return {
            letter: size
            for word, array in zip(self.labels, self.arrays, strict=True)
            for letter, size in zip(word, array.shape, strict=True)
        }

    def replace(self, **changes: Any) -> Term:
        """Return the term with some fields changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lazy:
    """A frozen weight and the deltas that belong to it."""

    value: Array
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.value.shape


class Unsupported(Exception):
    """An operation that a network can't follow: the weight is fused before it."""


def contract(
    arrays: Sequence[Array],
    labels: Sequence[str],
    output: str,
    *,
    dtype: Any = None,
    precision: Any = None,
) -> Array:
    """Return the einsum of the arrays in the cheapest order of pairwise products."""
    sizes = {
        letter: size
        for word, array in zip(labels, arrays, strict=True)
        for letter, size in zip(word, array.shape, strict=True)
    }
    if dtype is not None:
        arrays = [a.astype(dtype) for a in arrays]
    plan = plan_contraction(list(labels), output, sizes)
    stack = list(arrays)
    for step in plan.steps:
        a, b = (stack[i] for i in step.pair)
        stack.append(jnp.einsum(step.equation, a, b, precision=precision))
    return jnp.einsum(f"{plan.last}->{output}", stack[-1])


def delta(term: Term, dtype: Any = jnp.float32) -> Array:
    """Return a term's whole delta in the weight's present shape."""
    letters = "".join(term.axes)
    value = contract(term.arrays, term.labels, letters, dtype=dtype, precision=HIGHEST)
    value = value.reshape([axis_size(term, word) for word in term.axes])
    if term.pad is not None:
        value = jnp.pad(value, pad_widths(term.pad, value.ndim))
    return value


def fuse(weight: Lazy) -> Array:
    """Return weight + deltas, added in float32 or wider, in the weight's dtype."""
    if not weight.terms:
        return weight.value
    dtype = jnp.promote_types(weight.value.dtype, jnp.float32)
    # Deltas first: a start that is subtracted again then cancels exactly.
    change = sum_parts([delta(term, dtype) for term in weight.terms])
    return (weight.value.astype(dtype) + change).astype(weight.value.dtype)


def vary_alike(weight: Lazy) -> Lazy:
    """Return an adapted weight whose arrays vary over the same mesh axes.

    Inside `jax.shard_map` trained factors are each device's own while the frozen weight
    and a subtracted start are one for all. The function is traced with the weight's
    type, so that has to be the sum's.
    """
    leaves, tree = jax.tree.flatten(weight)
    return jax.tree.unflatten(tree, vary_together(*leaves))


def sum_parts(parts: Sequence[Array]) -> Array:
    """Return the sum of at least one array, in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def axis_size(term: Term, word: str) -> int:
    """Return the size of an axis made of these letters."""
    sizes = term.sizes
    return math.prod(sizes[a] for a in word)


def pad_widths(pad: tuple[int, int, int], ndim: int) -> list[tuple[int, int]]:
    """Return what `jnp.pad` takes."""
    axis, before, after = pad
    return [(before, after) if i == axis else (0, 0) for i in range(ndim)]


def reshape_term(term: Term, shape: Sequence[int]) -> Term:
    """Return the term of the reshaped weight; Unsupported where a letter is cut."""
    if term.pad is not None:
        raise Unsupported
    sizes, letters = term.sizes, list("".join(term.axes))
    axes = []
    for size in shape:
        word, width = "", 1
        while letters and (width < size or sizes[letters[0]] == 1):
            width *= sizes[letters[0]]
            word += letters.pop(0)
        if width != size:
            raise Unsupported
        axes.append(word)
    return term.replace(axes=tuple(axes))


def transpose_term(term: Term, order: Sequence[int]) -> Term:
    """Return the term of the transposed weight."""
    pad = term.pad
    if pad is not None:
        pad = (list(order).index(pad[0]), *pad[1:])
    return term.replace(axes=tuple(term.axes[i] for i in order), pad=pad)


def drop_axes(term: Term, axes: Sequence[int]) -> Term:
    """Return the term without some axes of size 1."""
    return _move_axes(term, [i for i in range(len(term.axes)) if i not in axes])


def insert_axes(term: Term, places: Sequence[int], ndim: int) -> Term:
    """Return the term whose axis i is axis `places[i]` of `ndim`, the others size 1."""
    words = [""] * ndim
    for place, word in zip(places, term.axes, strict=True):
        words[place] = word
    pad = term.pad
    if pad is not None:
        pad = (places[pad[0]], *pad[1:])
    return term.replace(axes=tuple(words), pad=pad)


def _move_axes(term: Term, kept: Sequence[int]) -> Term:
    pad = term.pad
    if pad is not None:
        if pad[0] not in kept:
            raise Unsupported
        pad = (list(kept).index(pad[0]), *pad[1:])
    return term.replace(axes=tuple(term.axes[i] for i in kept), pad=pad)


def map_axis(term: Term, axis: int, change: Any) -> Term:
    """Return the term of a weight changed along one axis of a single letter.

    `change(array, position)` is applied to every array that has the letter.
    """
    word = term.axes[axis]
    if term.pad is not None and term.pad[0] == axis:
        raise Unsupported
    letters = [a for a in word if term.sizes[a] > 1]
    if len(letters) != 1:
        raise Unsupported
    arrays = tuple(
        change(array, labels.index(letters[0])) if letters[0] in labels else array
        for array, labels in zip(term.arrays, term.labels, strict=True)
    )
    axes = tuple(letters[0] if i == axis else w for i, w in enumerate(term.axes))
    return term.replace(arrays=arrays, axes=axes)


def concat_term(term: Term, axis: int, before: int, after: int) -> Term:
    """Return the term of a concatenation with so much before and after it."""
    if term.pad is None:
        return term.replace(pad=(axis, before, after))
    if term.pad[0] != axis:
        raise Unsupported
    return term.replace(pad=(axis, term.pad[1] + before, term.pad[2] + after))


def without_letter(term: Term, letter: str, pick: Any) -> Term:
    """Return the term of one index of a batch axis; `pick(array, position)` takes it.

    Arrays without the letter are shared by all indices and stay.
    """
    arrays, labels = [], []
    for array, word in zip(term.arrays, term.labels, strict=True):
        if letter in word:
            array = pick(array, word.index(letter))
            word = word.replace(letter, "")
        arrays.append(array)
        labels.append(word)
    axes = tuple(word.replace(letter, "") for word in term.axes)
    return term.replace(arrays=tuple(arrays), labels=tuple(labels), axes=axes)
