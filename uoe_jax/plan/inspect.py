"""Which collectives a traced step makes: by kind, axes, bytes and how often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Primitives by the name of what devices do; casts between types are not communication.
_KINDS = {
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "all_gather_reduced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "ppermute": "collective_permute",
    "all_to_all": "all_to_all",
    "ragged_all_to_all": "all_to_all",
}


class Traffic(NamedTuple):
    """Collectives of one kind over the same axes and of the same size.

    `num_bytes` is what one device holds of the array, before a gather and after a
    scatter; `count` how often that happens in a step; `in_layers` whether it is inside
    the scan over layers.
    """

    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    count: int
    in_layers: bool


def traffic_of(jaxpr: Any) -> list[Traffic]:
    """Return the collectives of a traced function, the largest first."""
    found: Counter[Traffic] = Counter()
    for item in _walk(getattr(jaxpr, "jaxpr", jaxpr), 1, False):
        found[item._replace(count=0)] += item.count
    merged = [item._replace(count=count) for item, count in found.items()]
    return sorted(merged, key=lambda item: (-item.num_bytes * item.count, item))


def count_kinds(traffic: Iterable[Traffic], *, in_layers: bool) -> dict[str, int]:
    """Return how often each "kind over axes" happens, inside or outside of layers."""
    counts: Counter[str] = Counter()
    for item in traffic:
        if item.in_layers == in_layers:
            counts[f"{item.kind} over {' and '.join(item.axes)}"] += item.count
    return dict(sorted(counts.items()))


def _walk(jaxpr: Any, times: int, in_layers: bool) -> Iterator[Traffic]:
    for equation in jaxpr.eqns:
        kind = _KINDS.get(equation.primitive.name)
        if kind is not None:
            axes = _axes(equation.params)
            if axes:
                held = min(_bytes(equation.invars), _bytes(equation.outvars))
                yield Traffic(kind, axes, held, times, in_layers)
            continue
        repeat, inside = times, in_layers
        if equation.primitive.name == "scan":
            repeat, inside = times * equation.params["length"], True
        for inner in _inner(equation.params):
            yield from _walk(inner, repeat, inside)


def _axes(params: Mapping[str, Any]) -> tuple[str, ...]:
    names = params.get("axes", params.get("axis_name", ()))
    names = names if isinstance(names, (tuple, list)) else (names,)
    return tuple(name for name in names if isinstance(name, str))


def _bytes(variables: Iterable[Any]) -> int:
    return sum(
        math.prod(v.aval.shape) * jax.dtypes.itemsize_bits(v.aval.dtype) // 8
        for v in variables
    )


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
