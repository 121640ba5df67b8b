"""Adapters added into the weights, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from uoe_jax.adapt.adapters import Adapters, named_params, replace_params
from uoe_jax.adapt.apply import adapted_params


class Merged(NamedTuple):
    """Parameters with deltas added, and the weights as they were before."""

    params: PyTree
    originals: dict[str, Array]


def merge(params: PyTree, adapters: Adapters | Sequence[Adapters]) -> Merged:
    """Return the parameters with all deltas added in float32, and the originals.

    Merging into bfloat16 weights rounds the delta away: where |dW|/|W| is 1% the error
    is near 16% of the delta's output. Keep float32 parameters, or the adapter apart.
    """
    sets = [adapters] if isinstance(adapters, Adapters) else list(adapters)
    names = {plan.name for one in sets for plan in one.plans}
    originals = {n: leaf for n, leaf in named_params(params).items() if n in names}
    return Merged(adapted_params(params, sets), originals)


def unmerge(merged: Merged) -> Any:
    """Return the parameters before `merge`, bit for bit: the stored weights."""
    return replace_params(merged.params, merged.originals)
