"""Factors laid out on devices as the weight's own axes are; rank axes are whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.plan import LeafPlan
from uoe_jax.errors import ConfigError
from uoe_jax.tree import named_leaves

Specs = dict[str, dict[str, PartitionSpec]]


def inherit_specs(plan: LeafPlan, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """Return the layout of every part of one adapter from its weight's.

    LoRA's A is split as the weight's input axes, B as its output axes; Tucker's factors
    as their modes, its core not at all but for experts and layers.
    """
    entries = [*spec, *[None] * (len(plan.axes.axes) - len(spec))]
    by_letter = dict(zip(plan.axes.axes, entries, strict=True))
    lead = [None] if plan.bank else []
    return {
        part: PartitionSpec(*lead, *(by_letter.get(a) for a in word))
        for part, word in plan.labels
    }


def adapter_specs(
    adapters: Adapters, weight_specs: Mapping[str, PartitionSpec]
) -> Specs:
    """Return the layout of an adapter's arrays from its weights' by name.

    Raises ConfigError for a weight without a layout.
    """
    for plan in adapters.plans:
        if plan.name not in weight_specs:
            raise ConfigError(
                f"no layout for {plan.name}; give every adapted weight's PartitionSpec"
            )
    return {p.name: inherit_specs(p, weight_specs[p.name]) for p in adapters.plans}


def place_adapters(adapters: Adapters, params: PyTree) -> Adapters:
    """Return the adapter on its weights' devices, laid out as these are."""

    def place(name: str, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        sharding = leaves[name].sharding
        if not isinstance(sharding, NamedSharding):
            return jax.device_put(parts, sharding)
        specs = inherit_specs(adapters[name], sharding.spec)
        return {
            part: jax.device_put(array, NamedSharding(sharding.mesh, specs[part]))
            for part, array in parts.items()
        }

    leaves = named_leaves(params)
    trees = (adapters.weights, adapters.anchor)
    weights, anchor = ({n: place(n, parts) for n, parts in t.items()} for t in trees)
    return dataclasses.replace(adapters, weights=weights, anchor=anchor)
