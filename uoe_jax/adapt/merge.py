"""Adapters added into the weights, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.apply import adapted_params
from uoe_jax.tree import named_leaves, replace_leaves


class Merged(NamedTuple):
    """Parameters with deltas added, and the weights as they were before."""

    params: PyTree
    originals: dict[str, Array]


def merge(params: PyTree, adapters: Adapters | Sequence[Adapters]) -> Merged:
    """Return the parameters with all deltas added in float32, and the originals.

    Merging into bfloat16 weights rounds the delta away: where |dW|/|W| is 1% the error
    is near 16% of the delta's output (`kept_share` says how much is left). Keep
    float32 parameters, or the adapter apart.
    """
    sets = [adapters] if isinstance(adapters, Adapters) else list(adapters)
    names = {plan.name for one in sets for plan in one.plans}
    originals = {n: leaf for n, leaf in named_leaves(params).items() if n in names}
    return Merged(adapted_params(params, sets), originals)


def kept_share(
    params: PyTree, adapters: Adapters | Sequence[Adapters], dtype: Any = None
) -> Array:
    """Return which share of all deltas together is left after the merge, 0 to 1.

    1 - |(W' - W) - dW| / |dW| over all adapted weights, W' the merged weight as it is
    stored; with `dtype`, as products in that dtype take it. 1 for deltas of zero.
    """
    sets = [adapters] if isinstance(adapters, Adapters) else list(adapters)
    names = {plan.name for one in sets for plan in one.plans}
    wide = replace_leaves(
        params,
        {n: w.astype(jnp.float32) for n, w in named_leaves(params).items()},
    )
    target = named_leaves(adapted_params(wide, sets))
    merged = named_leaves(adapted_params(params, sets))
    total, lost = jnp.float32(0), jnp.float32(0)
    for name, weight in named_leaves(params).items():
        if name in names:
            used = weight.dtype if dtype is None else dtype
            seen = lambda a, used=used: a.astype(used).astype(jnp.float32)
            change = target[name] - weight.astype(jnp.float32)
            total += jnp.sum(jnp.square(change))
            lost += jnp.sum(jnp.square(seen(merged[name]) - seen(weight) - change))
    share = 1.0 - jnp.sqrt(lost) / jnp.sqrt(jnp.where(total > 0, total, 1.0))
    return jnp.where(total > 0, jnp.maximum(share, 0.0), 1.0)


def unmerge(merged: Merged) -> Any:
    """Return the parameters before `merge`, bit for bit: the stored weights."""
    return replace_leaves(merged.params, merged.originals)
