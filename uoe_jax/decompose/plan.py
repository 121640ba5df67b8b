"""How to cut a dense model: the order of its neurons and the routers to start with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uoe_jax.config import ModelConfig
from uoe_jax.decompose.calibrate import LayerValues, layer_values
from uoe_jax.decompose.group import Grouping, contributions, order_neurons
from uoe_jax.decompose.layers import (
    from_layers,
    to_layers,
)
from uoe_jax.decompose.route import (
    RouterFit,
    RouterStart,
    expert_lengths,
    fit_router,
)
from uoe_jax.decompose.split import PARTS, split_params
from uoe_jax.model import flat_params
from uoe_jax.tree import Arrays


class Plan(NamedTuple):
    """A union's parameters, its neurons' order, and the routers fitted for it."""

    params: Arrays  # routers zero: with every expert chosen, exactly the dense model
    order: Int[np.ndarray, "L F"]
    routers: dict[tuple[int, str], RouterFit]  # by layer and part


def make_plan(
    model: Any,
    union: ModelConfig,
    grouping: Grouping,
    router: RouterStart,
    batch: Mapping[str, np.ndarray] | None,
    seed: int = 0,
) -> Plan:
    """Return a dense model cut into `union`; `batch` is for what calibrates.

    The neurons of layers whose MLP stays dense keep their order.
    """
    config, params = model.config, flat_params(model)
    layers = to_layers(params, config)[1]
    calibrates = router != "zero" or grouping == "coactivation"
    values = layer_values(model, batch) if calibrates and batch is not None else None
    orders, routers = [], {}
    for number, kinds in enumerate(union.layer_kinds):
        seen = next(values) if values is not None else None
        order = np.arange(config.d_ff)
        if kinds[PARTS.index("mlp")] == "union":
            written = None
            if seen is not None:
                w_down = layers[number]["mlp.w_down"][0].astype(np.float32)
                written = contributions(seen.neurons, w_down)
            order = order_neurons(
                grouping,
                union.union_for("mlp").num_experts,
                config.d_ff,
                seed=seed + number,
                contributions=written,
            )
        orders.append(order)
        if router != "zero" and seen is not None:
            routers |= _fit_layer(layers[number], union, number, order, seen)
    order = np.stack(orders).astype(np.int32)
    return Plan(split_params(params, config, union, order), order, routers)


def _fit_layer(
    layer: Mapping[str, np.ndarray],
    union: ModelConfig,
    number: int,
    order: Int[np.ndarray, " F"],
    seen: LayerValues,
) -> dict[tuple[int, str], RouterFit]:
    fits: dict[tuple[int, str], RouterFit] = {}
    for part, kind in zip(PARTS, union.layer_kinds[number], strict=True):
        if kind != "union":
            continue
        routed = union.union_for(part)
        name = "mlp.w_down" if part == "mlp" else "attention.wo"
        weight = layer[name][0].astype(np.float32)
        if part == "mlp":
            x, weight, inner = seen.mlp_input, weight[order], seen.neurons[:, order]
        else:
            x, inner = seen.attention_input, seen.heads
        shape = (routed.num_experts, -1, union.d_model)
        shares = expert_lengths(inner.reshape(len(x), -1), weight.reshape(shape))
        # Experts that are always on have no score.
        fits[number, part] = fit_router(x, shares[:, routed.num_shared :])
    return fits


def with_routers(plan: Plan, union: ModelConfig) -> tuple[Arrays, Arrays]:
    """Return a plan's parameters with its routers in place, and their biases."""
    rest, layers = to_layers(plan.params, union)
    biases: list[dict[str, Any]] = [{} for _ in layers]
    for (number, part), fit in plan.routers.items():
        name = f"{part}.router"
        layers[number][f"{name}.weight"] = fit.weight.astype(np.float32)
        biases[number][f"{name}.bias"] = fit.bias.astype(np.float32)
    return from_layers(rest, layers, union), from_layers({}, biases, union)
