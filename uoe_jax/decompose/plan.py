"""How to cut a dense model: its neurons' order, routers, fitted down-projections."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.decompose.cut import PARTS, Cut
from uoe_jax.decompose.group import Neurons, contributions, order_neurons
from uoe_jax.decompose.measure import LayerError, layer_error
from uoe_jax.decompose.refit import (
    Refit,
    chosen_gates,
    core_first,
    fit_down,
    written,
)
from uoe_jax.decompose.route import (
    RouterFit,
    cluster_router,
    expert_lengths,
    fit_router,
)
from uoe_jax.decompose.split import split_params
from uoe_jax.errors import ConfigError
from uoe_jax.model import flat_params
from uoe_jax.model.observe import LayerValues, Stream
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.runs.probe import hidden_loss
from uoe_jax.tree import Arrays

Batch = Mapping[str, np.ndarray]


class Plan(NamedTuple):
    """A union's parameters, its neurons' order, and what was fitted for it."""

    params: Arrays  # routers zero: with every expert chosen, exactly the dense model
    order: Int[np.ndarray, "L F"]
    routers: dict[tuple[int, str], RouterFit]  # by layer and part
    refits: dict[int, Refit]  # by layer


def make_plan(model: Any, union: ModelConfig, cut: Cut, batch: Batch | None) -> Plan:
    """Return a dense model cut into `union`; `batch` is for what calibrates.

    The neurons of layers whose MLP stays dense keep their order. Refitted layers see
    what the layers before them write once they are cut, and make up for it, unless
    heads are routed too: then each layer is fitted on the dense model's values.
    """
    decided = Decided(union, cut)
    decide(model, [decided], batch)
    return decided.plan(model)


def decide(
    model: Any,
    wanted: Sequence[Decided],
    batch: Batch | None,
    held: Batch | None = None,
) -> None:
    """Decide on each cut of a dense model, in one pass through it.

    With `held`, other data, each layer's error there is measured.
    """
    layers = to_layers(flat_params(model), model.config)[1]
    if not any(each.cut.calibrates for each in wanted):
        batch = None
    dense, told = (None if b is None else Stream(model, b) for b in (batch, held))
    with jax.default_matmul_precision("highest"):
        for each in wanted:
            each.begin(model, batch, held)
        for number, layer in enumerate(layers):
            seen = None if dense is None else dense.run_layer()
            held_out = None if told is None else told.run_layer()
            shared = _Layer(number, layer, seen, held_out)
            for each in wanted:
                each.decide_layer(shared)
        for each in wanted:
            each.finish(model, held)


class Decided:
    """What one cut decides on, layer after layer.

    With `follows` refitted layers see what those before them write once they are cut.
    `errors` are the layers' relative output errors on held-out data, by layer; `loss`
    is the whole cut model's there, None of heads that are cut and of other models than
    decoders.
    """

    def __init__(self, union: ModelConfig, cut: Cut, *, follows: bool = True):
        self.union, self.cut = union, cut
        self.orders: list[Int[np.ndarray, " F"]] = []
        self.routers: dict[tuple[int, str], RouterFit] = {}
        self.refits: dict[int, Refit] = {}
        self.errors: dict[int, LayerError] = {}
        self.loss: float | None = None
        self._mlp_only = "union" not in union.attention
        self._scored = self._mlp_only and union.kind == "decoder"
        self._follows = follows and cut.refit and self._mlp_only
        # What the cut layers so far write: of the data that calibrate, and of others.
        self._after: Stream | None = None
        self._told: Stream | None = None

    def begin(self, model: Any, batch: Batch | None, held: Batch | None) -> None:
        """Start at the model's first layer."""
        if self._follows and batch is not None:
            self._after = Stream(model, batch)
        if self._scored and held is not None:
            self._told = Stream(model, held)

    def finish(self, model: Any, held: Batch | None) -> None:
        """End after the model's last layer."""
        if self._told is not None and held is not None:
            self.loss = hidden_loss(model, self._told.hidden(), held)
        self._after = self._told = None

    def plan(self, model: Any) -> Plan:
        """Return the union's parameters with what was decided on."""
        order = np.stack(self.orders).astype(np.int32)
        params = split_params(flat_params(model), model.config, self.union, order)
        return Plan(params, order, self.routers, self.refits)

    def decide_layer(self, layer: _Layer) -> None:
        """Decide on the next layer."""
        cut, number = self.cut, layer.number
        seen = layer.seen if cut.calibrates else None
        now = seen if self._after is None else self._after.run_layer()
        told = None if self._told is None else self._told.run_layer()
        routed = self.union.layer_kinds[number][1] == "union"
        order = layer.order(cut) if routed else np.arange(self.union.d_ff)
        self.orders.append(order)
        weights = layer.weights
        if now is not None and cut.start != "zero":
            self.routers |= _fit_layer(weights, self.union, cut, number, order, now)
        if not routed:
            return
        router = self.routers.get((number, "mlp"))
        w_down = jnp.take(layer.w_down, order, axis=0)
        if now is not None and seen is not None and cut.refit:
            gates = chosen_gates(now.mlp_input, router, self.union.union_for("mlp"))
            wanted = seen.residual + seen.output - now.residual - _bias(weights)
            found = fit_down(_taken(now.neurons, order), gates, w_down, wanted)
            w_down = found.w_down
            if self._after is not None:
                self._after.replace_output(found.outputs + _bias(weights))
            self.refits[number] = found.without_outputs()
        union = self.union.union_for("mlp")
        if (held := layer.held) is not None:
            neurons, wanted = _taken(held.neurons, order), held.output - _bias(weights)
            gates = chosen_gates(held.mlp_input, router, union)
            self.errors[number] = layer_error(neurons, wanted, w_down, gates)
        if self._told is not None and told is not None:
            gates = chosen_gates(told.mlp_input, router, union)
            outputs = written(_taken(told.neurons, order), gates, w_down)
            self._told.replace_output(outputs + _bias(weights))


class _Layer:
    """One layer of the dense model, and what cuts of it share.

    `seen` are its values on data to calibrate on, `held` on other data.
    """

    def __init__(
        self,
        number: int,
        weights: Mapping[str, np.ndarray],
        seen: LayerValues | None,
        held: LayerValues | None,
    ):
        self.number, self.weights, self.seen, self.held = number, weights, seen, held
        self.w_down = jnp.asarray(weights["mlp.w_down"][0], jnp.float32)
        self._parts: dict[int, tuple[np.ndarray, np.ndarray, Neurons]] = {}
        self._orders: dict[Any, np.ndarray] = {}

    def order(self, cut: Cut) -> Int[np.ndarray, " F"]:
        """Return the neurons in the order in which they are cut: the core first."""
        grouping, experts, shared = cut.grouping, cut.experts, cut.shared
        if grouping == "all":
            raise ConfigError("a cut has one grouping; compare_groupings tries all")
        key = (grouping, experts, shared, cut.seed)
        if key not in self._orders:
            core, rest, neurons = self._split(shared * (len(self.w_down) // experts))
            seed = cut.seed + self.number
            order = order_neurons(grouping, experts - shared, neurons, seed=seed)
            self._orders[key] = np.concatenate([core, rest[order]])
        return self._orders[key]

    def _split(self, size: int) -> tuple[np.ndarray, np.ndarray, Neurons]:
        """Return the core of `size` neurons, the rest, and the rest to be grouped."""
        if size not in self._parts:
            rest = np.arange(len(self.w_down))
            core = rest[:0]
            if self._written is not None:
                mask = core_first(self._written, size)
                core, rest = np.flatnonzero(mask), np.flatnonzero(~mask)
            self._parts[size] = core, rest, self._neurons.among(rest)
        return self._parts[size]

    @functools.cached_property
    def _written(self) -> Float[Array, "N F"] | None:
        if self.seen is None:
            return None
        return contributions(self.seen.neurons, self.w_down)

    @functools.cached_property
    def _neurons(self) -> Neurons:
        names = [n for n in ("mlp.w_up", "mlp.w_gate") if n in self.weights]
        read = [self.weights[n][0].astype(np.float32) for n in names]
        return Neurons(len(self.w_down), self._written, np.concatenate(read))


def _taken(
    neurons: Float[Array, "N F"], order: Int[np.ndarray, " F"]
) -> Float[Array, "N F"]:
    """Return neurons in another order."""
    return jnp.take(neurons, order, axis=1)


def _bias(layer: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the MLP's output bias, a row of no expert's; 0 without one."""
    found = layer.get("mlp.b_down")
    return np.zeros((1, 1), np.float32) if found is None else found[None]


def _fit_layer(
    layer: Mapping[str, np.ndarray],
    union: ModelConfig,
    cut: Cut,
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
            x, weight, inner = seen.mlp_input, weight[order], seen.neurons
            inner = _taken(inner, order)
        else:
            x, inner = seen.attention_input, seen.heads
        shape = (routed.num_experts, -1, union.d_model)
        shares = expert_lengths(inner.reshape(len(x), -1), weight.reshape(shape))
        # Experts that are always on have no score.
        shares = shares[:, routed.num_shared :]
        fit = cluster_router if cut.start == "clusters" else fit_router
        fits[number, part] = fit(x, shares)
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
