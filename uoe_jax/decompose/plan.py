"""How to cut a dense model: its neurons' order, routers, fitted down-projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uoe_jax.config import ModelConfig
from uoe_jax.decompose.cut import PARTS, Cut
from uoe_jax.decompose.group import contributions, order_neurons
from uoe_jax.decompose.refit import Refit, chosen_gates, core_first, fit_down
from uoe_jax.decompose.route import (
    RouterFit,
    expert_lengths,
    fit_router,
)
from uoe_jax.decompose.split import split_params
from uoe_jax.model import flat_params
from uoe_jax.model.observe import LayerValues, Stream
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.tree import Arrays


class Plan(NamedTuple):
    """A union's parameters, its neurons' order, and what was fitted for it."""

    params: Arrays  # routers zero: with every expert chosen, exactly the dense model
    order: Int[np.ndarray, "L F"]
    routers: dict[tuple[int, str], RouterFit]  # by layer and part
    refits: dict[int, Refit]  # by layer


def make_plan(
    model: Any, union: ModelConfig, cut: Cut, batch: Mapping[str, np.ndarray] | None
) -> Plan:
    """Return a dense model cut into `union`; `batch` is for what calibrates.

    The neurons of layers whose MLP stays dense keep their order. Refitted layers see
    what the layers before them write once they are cut, and make up for it, unless
    heads are routed too: then each layer is fitted on the dense model's values.
    """
    config, params = model.config, flat_params(model)
    layers = to_layers(params, config)[1]
    if not cut.calibrates:
        batch = None
    dense = None if batch is None else Stream(model, batch)
    follows = cut.refit and "union" not in union.attention
    after_cuts = Stream(model, batch) if batch is not None and follows else None
    orders, routers, refits = [], {}, {}
    for number, (_, kind) in enumerate(union.layer_kinds):
        seen = None if dense is None else dense.run_layer()
        now = seen if after_cuts is None else after_cuts.run_layer()
        order = np.arange(config.d_ff)
        if kind == "union":
            order = _order(layers[number], union, cut, number, seen)
        orders.append(order)
        if now is None or seen is None:
            continue
        if cut.start != "zero":
            routers |= _fit_layer(layers[number], union, number, order, now)
        if cut.refit and kind == "union":
            router = routers.get((number, "mlp"))
            found = _refit_layer(layers[number], union, order, router, (seen, now))
            refits[number] = found
            if after_cuts is not None:
                after_cuts.replace_output(found.outputs + _bias(layers[number]))
    order = np.stack(orders).astype(np.int32)
    return Plan(split_params(params, config, union, order), order, routers, refits)


def _order(
    layer: Mapping[str, np.ndarray],
    union: ModelConfig,
    cut: Cut,
    number: int,
    seen: LayerValues | None,
) -> Int[np.ndarray, " F"]:
    """Return one layer's neurons in the order in which they are cut: the core first."""
    width, rest = union.d_ff // cut.num_experts, np.arange(union.d_ff)
    written, core = None, rest[:0]
    if seen is not None:
        w_down = layer["mlp.w_down"][0].astype(np.float32)
        written = contributions(seen.neurons, w_down)
        if cut.shared:
            mask = core_first(written, cut.shared * width)
            core, rest = np.flatnonzero(mask), np.flatnonzero(~mask)
            written = written[:, rest]
    order = order_neurons(
        cut.grouping,
        cut.num_experts - cut.shared,
        len(rest),
        seed=cut.seed + number,
        contributions=written,
    )
    return np.concatenate([core, rest[order]])


def _bias(layer: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the MLP's output bias, which belongs to no expert; 0 without one."""
    found = layer.get("mlp.b_down")
    return np.zeros((), np.float32) if found is None else found.astype(np.float32)


def _refit_layer(
    layer: Mapping[str, np.ndarray],
    union: ModelConfig,
    order: Int[np.ndarray, " F"],
    router: RouterFit | None,
    values: tuple[LayerValues, LayerValues],
) -> Refit:
    """Return the down-projection that brings the stream back to the dense model's.

    `values` are the dense model's and those after the cuts so far.
    """
    seen, now = values
    gates = chosen_gates(now.mlp_input, router, union.union_for("mlp"))
    wanted = seen.residual + seen.output - now.residual - _bias(layer)
    w_down = layer["mlp.w_down"][0].astype(np.float32)
    return fit_down(now.neurons[:, order], gates, w_down[order], wanted)


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


def as_written(plan: Plan, union: ModelConfig) -> tuple[Arrays, Arrays]:
    """Return a plan's parameters with all that was fitted, and the routers' biases."""
    rest, layers = to_layers(plan.params, union)
    biases: list[dict[str, Any]] = [{} for _ in layers]
    for (number, part), fit in plan.routers.items():
        name = f"{part}.router"
        layers[number][f"{name}.weight"] = fit.weight.astype(np.float32)
        biases[number][f"{name}.bias"] = fit.bias.astype(np.float32)
    for number, refit in plan.refits.items():
        old = layers[number]["mlp.w_down"]
        layers[number]["mlp.w_down"] = refit.w_down.reshape(old.shape).astype(old.dtype)
    return from_layers(rest, layers, union), from_layers({}, biases, union)
