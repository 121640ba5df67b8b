"""Adapters as pytrees: the trained arrays by weight, their scales, and the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.init import init_leaf
from uoe_jax.adapt.plan import (
    LeafPlan,
    leaf_scale,
    make_plans,
    warn_of,
    warn_of_tied,
)
from uoe_jax.tree import named_leaves
from uoe_jax.weights import WeightAxes

Weights = dict[str, dict[str, Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adapters:
    """One adapter over several weights, or a bank of K of them side by side.

    Only `weights` is trained. `anchor` holds the factors a `hosvd` start subtracts, so
    that a fresh adapter changes nothing. In a bank every array has a leading axis K,
    and scales are [K].
    """

    weights: Weights  # parameter name -> part -> array
    scales: dict[str, Array]  # parameter name -> factor of the delta
    anchor: Weights
    plans: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> LeafPlan:
        for plan in self.plans:
            if plan.name == name:
                return plan
        raise KeyError(name)

    def with_weights(self, weights: Weights) -> Adapters:
        """Return the adapter with other trained arrays."""
        return dataclasses.replace(self, weights=weights)


def init_adapters(
    params: PyTree,
    config: AdapterConfig,
    key: jax.Array,
    *,
    axes: Mapping[str, WeightAxes] | None = None,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Return a fresh adapter of the weights that `config.targets` choose.

    Its delta is exactly zero. Warns of ranks that a weight can't have, of adapters as
    large as what they adapt and of DoRA without a matrix. Raises ConfigError as
    `make_plans` does.
    """
    leaves = named_leaves(params)
    plans = make_plans({n: leaf.shape for n, leaf in leaves.items()}, config, axes)
    warn_of(plans, use_dora=config.use_dora)
    warn_of_tied(plans, leaves)
    weights: Weights = {}
    for number, plan in enumerate(plans):
        leaf_key = jax.random.fold_in(key, number)
        weights[plan.name] = init_leaf(
            plan, config.init, leaf_key, leaves[plan.name], leaf_scale(plan, config)
        )
    weights = jax.tree.map(lambda a: a.astype(dtype), weights)
    anchor: Weights = {}
    if config.init == "hosvd":
        for name, parts in weights.items():
            factors = {p: a for p, a in parts.items() if p != "magnitude"}
            anchor[name] = jax.tree.map(jnp.copy, factors)
    scales = {p.name: jnp.float32(leaf_scale(p, config)) for p in plans}
    return Adapters(weights=weights, scales=scales, anchor=anchor, plans=plans)


def count_adapter_params(adapters: Adapters) -> int:
    """Return how many numbers one adapter trains."""
    return sum(plan.num_params for plan in adapters.plans)
