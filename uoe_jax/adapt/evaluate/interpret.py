"""A function of parameters, evaluated with adapters that it knows nothing of.

The function is traced to a jaxpr and evaluated again with each adapted weight standing
for weight + delta. Reshapes, casts, slices and loops over layers are followed; where
the weight meets an input, the delta joins by the cheapest path. Any other operation
gets the sum of weight and delta, so that every function is evaluated right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, PyTree

from uoe_jax.adapt.evaluate import network
from uoe_jax.adapt.evaluate.convolution import convolve
from uoe_jax.adapt.evaluate.network import Lazy, Unsupported
from uoe_jax.adapt.evaluate.products import (
    Mode,
    dot_general,
    fuse_for,
    routed_product,
    take_rows,
)
from uoe_jax.ops.grouped_matmul.derivative import gathered, grouped, scattered
from uoe_jax.ops.packing import Packing

# By the names that their derivative rules give them in programs.
ROUTED = {
    gathered.__name__: "gather_project",
    scattered.__name__: "project_scatter",
    grouped.__name__: "grouped_matmul",
}


def call_adapted(
    fn: Callable[..., Any],
    params: PyTree,
    lazies: dict[int, Lazy],
    args: tuple,
    mode: Mode,
) -> Any:
    """Return `fn(params, *args)` with some leaves of params, by number, adapted."""
    leaves, tree = jax.tree.flatten((params, *args))
    # Traced with the types that the adapted weights have: a cast to "varying", say,
    # is written down only where the weight isn't that already.
    leaves = [lazies[i].value if i in lazies else a for i, a in enumerate(leaves)]
    closed, shape = jax.make_jaxpr(
        lambda *flat: fn(*jax.tree.unflatten(tree, flat)), return_shape=True
    )(*leaves)
    # Vectors and DoRA's weights have their deltas in them already.
    apart = {i: lazy for i, lazy in lazies.items() if lazy.terms}
    values = [apart.get(i, leaf) for i, leaf in enumerate(leaves)]
    outs = evaluate(closed.jaxpr, closed.consts, values, mode)
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], mode: Mode
) -> list[Array]:
    """Return a jaxpr's outputs; arguments may be adapted weights."""
    outs = _run(jaxpr, consts, args, mode)
    return [network.fuse(v) if isinstance(v, Lazy) else v for v in outs]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], mode: Mode) -> list:
    env: dict[Any, Any] = {}
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if any(isinstance(v, Lazy) for v in values):
            outs = _adapted(eqn, values, mode)
        else:
            outs = _bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _adapted(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """Return the outputs of an operation on adapted weights."""
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None:
        try:
            return rule(eqn, values, mode)
        except Unsupported:
            pass
    fused = [
        fuse_for(v, eqn.primitive.name, mode) if isinstance(v, Lazy) else v
        for v in values
    ]
    return _bind(eqn, fused)


def _follow(change: Callable[[Any, network.Term], network.Term]) -> Callable:
    """Return the rule of an operation that only rearranges its first operand."""

    def rule(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
        weight = values[0]
        if not isinstance(weight, Lazy) or any(isinstance(v, Lazy) for v in values[1:]):
            raise Unsupported
        terms = tuple(change(eqn, term) for term in weight.terms)
        return [Lazy(_bind(eqn, [weight.value, *values[1:]])[0], terms)]

    return rule


def _same(eqn: Any, term: network.Term) -> network.Term:
    return term


def _broadcast(eqn: Any, term: network.Term) -> network.Term:
    shape = eqn.params["shape"]
    if math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
        raise Unsupported
    places = [int(i) for i in eqn.params["broadcast_dimensions"]]
    return network.insert_axes(term, places, len(shape))


def _cast(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """A cast to another kind of number isn't the weight any more."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported
    return _follow(_same)(eqn, values, mode)


def _cut(term: network.Term, axis: int, *bounds: int) -> network.Term:
    """Return the term of a slice along one axis: start, stop and perhaps stride."""
    cut = lambda array, place: jax.lax.slice_in_dim(array, *bounds, axis=place)
    return network.map_axis(term, axis, cut)


def _slice(eqn: Any, term: network.Term) -> network.Term:
    shape, params = eqn.invars[0].aval.shape, eqn.params
    strides = params["strides"] or (1,) * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, stride) in enumerate(bounds):
        if (start, stop, stride) != (0, shape[axis], 1):
            term = _cut(term, axis, start, stop, stride)
    return term


def _split(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    (weight,) = values
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    if len(sizes) == 1:
        return [weight]
    stops = itertools.accumulate(sizes)
    parts = _bind(eqn, [weight.value])
    return [
        Lazy(part, tuple(_cut(t, axis, stop - size, stop) for t in weight.terms))
        for part, size, stop in zip(parts, sizes, stops, strict=True)
    ]


def _dynamic_slice(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    weight, *starts = values
    if not isinstance(weight, Lazy):
        raise Unsupported
    terms = list(weight.terms)
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if size != weight.shape[axis]:
            cut = lambda array, place, start=starts[axis], size=size: (
                jax.lax.dynamic_slice_in_dim(array, start, size, axis=place)
            )
            terms = [network.map_axis(term, axis, cut) for term in terms]
    return [Lazy(_bind(eqn, [weight.value, *starts])[0], tuple(terms))]


def _concatenate(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    axis = eqn.params["dimension"]
    widths = [v.shape[axis] for v in values]
    terms = []
    for number, value in enumerate(values):
        before, after = sum(widths[:number]), sum(widths[number + 1 :])
        for term in value.terms if isinstance(value, Lazy) else ():
            terms.append(network.concat_term(term, axis, before, after))
    plain = [v.value if isinstance(v, Lazy) else v for v in values]
    return [Lazy(_bind(eqn, plain)[0], tuple(terms))]


def _vary(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """A weight typed as varying over more mesh axes: so are its factors."""
    (weight,) = _follow(_same)(eqn, values, mode)
    return [network.vary_alike(weight)]


def _all_gather(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """A weight gathered from its shards: so are the factors that have the axis."""
    params = eqn.params
    if not params["tiled"]:
        raise Unsupported

    def gather(array: Array, place: int) -> Array:
        return jax.lax.all_gather(
            array,
            params["axis_name"],
            axis_index_groups=params["axis_index_groups"],
            axis=place,
            tiled=True,
        )

    change = lambda eqn, term: network.map_axis(
        term, params["all_gather_dimension"], gather
    )
    return _follow(change)(eqn, values, mode)


def _dot(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    lhs, rhs = values
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        lhs = fuse_for(lhs, "a product of two adapted weights", mode)
    bind = lambda a, b: _bind(eqn, [a, b])[0]
    first = isinstance(lhs, Lazy)
    weight, x = (lhs, rhs) if first else (rhs, lhs)
    return [dot_general(weight, x, bind, mode, eqn.params, first)]


def _convolve(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    x, kernel = values
    if isinstance(x, Lazy) or not isinstance(kernel, Lazy):
        raise Unsupported
    bind = lambda a, b: _bind(eqn, [a, b])[0]
    return [convolve(kernel, x, bind, mode, eqn.params)]


def _gather(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    table, indices = values
    if not isinstance(table, Lazy) or isinstance(indices, Lazy):
        raise Unsupported
    bind = lambda a, i: _bind(eqn, [a, i])[0]
    return [take_rows(table, indices, bind, mode, eqn.params)]


def _custom_vjp(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """Grouped products of a union are known by name; others get the fused weight."""
    inner, _ = _open(eqn.params["call_jaxpr"])
    # Debug names are "name" or "name at file:line", by release.
    operation = ROUTED.get(inner.debug_info.func_name.partition(" ")[0])
    if operation is None or not isinstance(values[1], Lazy):
        raise Unsupported
    x, weight, *ids = values
    if operation == "grouped_matmul":
        # Only the group offsets of a packing matter here.
        packing = Packing(ids[0], ids[0], ids[0], ids[0])
    else:
        packing = Packing(*ids)
    bind = lambda a, w: _bind(eqn, [a, w, *ids])[0]
    return [routed_product(weight, x, packing, bind, mode, operation)]


def _jit(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    return _run(*_open(eqn.params["jaxpr"]), values, mode)


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr and its constants, closed or not."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def _remat(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """Recompute as before, the deltas too; the dropout key is an argument."""
    inner = Mode(mode.path, mode.training, mode.next_key())

    def run(key: Any, *args: Any) -> list[Array]:
        inner.key, inner.sites = key, 0
        return evaluate(*_open(eqn.params["jaxpr"]), args, inner)

    run = jax.checkpoint(
        run, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
    )
    return run(inner.key, *values)


def _scan(eqn: Any, values: list[Any], mode: Mode) -> list[Any]:
    """Loop over layers: a stacked weight's factors are stacked along the same axis."""
    params = eqn.params
    body, body_consts = _open(params["jaxpr"])
    # What is sliced or stacked has an axis more outside than in the body.
    num_xs = _count_sliced(eqn.invars, body.invars)
    num_carry = len(eqn.outvars) - _count_sliced(eqn.outvars, body.outvars)
    num_consts = len(values) - num_xs - num_carry
    consts, xs = values[:num_consts], values[num_consts + num_carry :]
    carry = [
        fuse_for(v, "a loop's carry", mode) if isinstance(v, Lazy) else v
        for v in values[num_consts : num_consts + num_carry]
    ]
    key = mode.next_key()
    keys = None if key is None else jax.random.split(key, params["length"])
    split = [_unstack(v) if isinstance(v, Lazy) else (v, None) for v in xs]

    def step(carry: Any, item: Any) -> Any:
        key, slices = item
        inner = Mode(mode.path, mode.training, key)
        args = [
            value if rebuild is None else rebuild(value)
            for value, (_, rebuild) in zip(slices, split, strict=True)
        ]
        outs = evaluate(body, body_consts, [*consts, *carry, *args], inner)
        return outs[:num_carry], outs[num_carry:]

    carry, outs = jax.lax.scan(
        step,
        carry,
        (keys, [value for value, _ in split]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *outs]


def _count_sliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(o.aval.ndim > i.aval.ndim for o, i in pairs)


def _unstack(weight: Lazy) -> tuple[Any, Callable[[Any], Lazy]]:
    """Return what a scan slices of an adapted stack, and how a slice is put together.

    Factors without the layer's letter are shared by all layers: they stay outside.
    """
    moved, kinds = [], []
    for term in weight.terms:
        letter = term.axes[0]
        if len(letter) != 1 or (term.pad is not None and term.pad[0] == 0):
            raise Unsupported
        pad = term.pad and (term.pad[0] - 1, *term.pad[1:])
        stacked = {
            n: jnp.moveaxis(array, word.index(letter), 0)
            for n, (array, word) in enumerate(
                zip(term.arrays, term.labels, strict=True)
            )
            if letter in word
        }
        moved.append(stacked)
        rest = term.replace(
            labels=tuple(word.replace(letter, "") for word in term.labels),
            axes=term.axes[1:],
            pad=pad,
        )
        kinds.append(rest)

    def rebuild(item: Any) -> Lazy:
        value, slices = item
        terms = tuple(
            rest.replace(
                arrays=tuple(part.get(n, a) for n, a in enumerate(rest.arrays))
            )
            for rest, part in zip(kinds, slices, strict=True)
        )
        return Lazy(value, terms)

    return (weight.value, moved), rebuild


_RULES: dict[str, Callable[[Any, list[Any], Mode], list[Any]]] = {
    "reshape": _follow(
        lambda eqn, term: network.reshape_term(term, eqn.params["new_sizes"])
    ),
    "transpose": _follow(
        lambda eqn, term: network.transpose_term(term, eqn.params["permutation"])
    ),
    "squeeze": _follow(
        lambda eqn, term: network.drop_axes(term, eqn.params["dimensions"])
    ),
    "broadcast_in_dim": _follow(_broadcast),
    "slice": _follow(_slice),
    "split": _split,
    "copy": _follow(_same),
    "copy_p": _follow(_same),
    "pvary": _vary,
    "pcast": _vary,
    "name": _follow(_same),
    "all_gather": _all_gather,
    "convert_element_type": _cast,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "conv_general_dilated": _convolve,
    "gather": _gather,
    "custom_vjp_call": _custom_vjp,
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
}
