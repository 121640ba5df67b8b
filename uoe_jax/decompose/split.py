"""Dense weights cut into experts and joined again: reshapes only, so exact.

A dense layer is a union of one expert. Attention `[1, D, K, G, H] -> [E, D, K/E, G, H]`
cuts between key/value heads, each with its query heads; the MLP
`[1, D, F] -> [E, D, F/E]` cuts between neurons, in any order of them. Output biases
belong to no expert and stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from uoe_jax.config import LayerWidths, ModelConfig, UnionOverrides
from uoe_jax.decompose.cut import PARTS, Part
from uoe_jax.errors import ConfigError, divisors
from uoe_jax.kinds import ROUTERS
from uoe_jax.model import check_params, param_shapes
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.tree import Arrays
from uoe_jax.weights import ATTENTION, MLP

_WEIGHTS = {"attention": ATTENTION, "mlp": MLP}
_ROUTER = ".router."


def union_config(
    config: ModelConfig,
    num_experts: int,
    top_k: int,
    parts: Iterable[Part] = PARTS,
    attention_experts: int | None = None,
    shared: int = 0,
) -> ModelConfig:
    """Return a dense model's config with the given parts of every layer a union.

    Attention may have another number of experts; a token then uses the same share of
    them, rounded. `shared` experts of the MLP are always on, none of attention. Raises
    ConfigError if some part of the model isn't dense, or routers of zeros, which a cut
    starts with, would switch its experts off.
    """
    check_dense(config)
    if config.union.gate == "relu" or ROUTERS[config.union.router].varies:
        raise ConfigError(
            f"model.union has router {config.union.router!r} and gate "
            f"{config.union.gate!r}, whose experts are off where routers are zero, as "
            "a cut's are at first; take a run with router token and gate sigmoid"
        )
    parts = tuple(parts)
    if not parts:
        raise ConfigError("no part to decompose; name attention, mlp or both")
    heads = attention_experts or num_experts
    if "attention" in parts and config.num_kv_heads % heads:
        raise ConfigError(
            f"{heads} experts can't share out the model's {config.num_kv_heads} "
            "key/value heads; set attention_experts to one of "
            f"{divisors(config.num_kv_heads)}, or cut the MLP alone (parts mlp)"
        )
    union = dataclasses.replace(
        config.union, num_experts=num_experts, top_k=top_k, num_shared=shared
    )
    own = UnionOverrides(num_shared=0 if shared else None)
    if attention_experts is not None and attention_experts != num_experts:
        share = max(round(attention_experts * top_k / max(num_experts, 1)), 1)
        own = dataclasses.replace(own, num_experts=attention_experts, top_k=share)
    kinds: dict[str, Any] = {part: ("union",) for part in parts}
    return dataclasses.replace(config, union=union, union_attention=own, **kinds)


def merged_config(config: ModelConfig) -> ModelConfig:
    """Return a union's config with every layer dense.

    Raises ConfigError if it is dense already or some part is neither.
    """
    _check_kinds(config, {"dense", "union"}, "only unions and dense layers merge")
    if "union" not in config.attention + config.mlp:
        raise ConfigError("the model is dense already; nothing is left to merge")
    _check_whole(config)
    return dataclasses.replace(config, attention=("dense",), mlp=("dense",))


def check_dense(config: ModelConfig) -> None:
    """Raise ConfigError unless every layer of a model is dense."""
    if "union" in config.attention + config.mlp:
        raise ConfigError(
            f"the model is a union already (attention {list(config.attention)}, mlp "
            f"{list(config.mlp)}); merge it first, or take a dense run"
        )
    _check_kinds(config, {"dense"}, "only dense layers decompose")
    _check_whole(config)


def _check_whole(config: ModelConfig) -> None:
    """Raise ConfigError for layers narrower than their model."""
    if config.widths != LayerWidths():
        raise ConfigError(
            "the model's layers are narrower than itself (model.widths), and neurons "
            "are put in order for all layers alike; take the run from before they were "
            "cut"
        )


def _check_kinds(config: ModelConfig, known: set[str], rule: str) -> None:
    if config.additions:
        raise ConfigError(
            f"the model has {config.additions[0]}, which layers of another kind can't "
            "take over; take a run without it"
        )
    for name in ("attention", "mlp", "blocks"):
        for kind in getattr(config, name):
            if kind not in known | ({"all"} if name == "blocks" else set()):
                raise ConfigError(
                    f"model.{name} has {kind!r} layers; {rule}: take another run"
                )


def split_params(
    dense: Mapping[str, np.ndarray],
    dense_config: ModelConfig,
    union: ModelConfig,
    permutation: Int[np.ndarray, "L F"] | None = None,
) -> Arrays:
    """Return a union's parameters that compute what the dense ones do.

    Args:
      dense: parameters by name, as `flat_params` gives them.
      dense_config: the dense model's config.
      union: the union's config, of the same sizes; its dense layers stay dense.
      permutation: the order each layer's neurons get before they are cut; None keeps
        theirs. Layers whose MLP stays dense ignore it.

    Returns:
      Parameters by name; routers are zero, so that every gate is 1.

    Raises:
      ConfigError: a shape that doesn't fit, naming the parameter.
    """
    _check_order(permutation, union)
    rest, layers = to_layers(dense, dense_config)
    cut = []
    for number, layer in enumerate(layers):
        order = None if permutation is None else permutation[number]
        cut.append(_map_layer(layer, union, number, order, _cut))
    params = from_layers(rest, cut, union)
    return _fit(params, union)


def merge_params(
    params: Mapping[str, np.ndarray],
    union: ModelConfig,
    dense_config: ModelConfig,
    permutation: Int[np.ndarray, "L F"] | None = None,
) -> Arrays:
    """Return the dense parameters of a union's: `split_params` undone, bit for bit.

    `permutation` is the one the union was split with. Routers are left out: where they
    have learnt gates or leave experts out, the dense model computes something else.
    Works on gradients as well, as it only moves entries.
    """
    _check_order(permutation, union)
    rest, layers = to_layers(params, union)
    joined = []
    for number, layer in enumerate(layers):
        layer = {name: a for name, a in layer.items() if _ROUTER not in name}
        order = None if permutation is None else np.argsort(permutation[number])
        joined.append(_map_layer(layer, union, number, order, _join))
    return _fit(from_layers(rest, joined, dense_config), dense_config)


def _map_layer(
    layer: Mapping[str, np.ndarray],
    union: ModelConfig,
    number: int,
    order: Int[np.ndarray, " F"] | None,
    change: Any,
) -> Arrays:
    """Return a layer with the weights of its union parts cut or joined."""
    kinds: Sequence[str] = union.layer_kinds[number]
    result = dict(layer)
    for part, kind in zip(PARTS, kinds, strict=True):
        if kind != "union":
            continue
        experts = union.union_for(part).num_experts
        for name, weight in _WEIGHTS[part].items():
            if weight.cut and f"{part}.{name}" in layer:
                array = layer[f"{part}.{name}"]
                # Counted without the expert axis, which comes first.
                axis = weight.axes.index(weight.cut) - 1
                moved = order if part == "mlp" else None
                result[f"{part}.{name}"] = change(array, axis, experts, moved)
    return result


def _cut(weight: np.ndarray, axis: int, experts: int, order: Any) -> np.ndarray:
    weight = weight[0]
    if order is not None:
        weight = np.take(weight, order, axis)
    size = weight.shape[axis]
    if size % experts:
        raise ConfigError(
            f"{experts} experts don't divide {size} heads or neurons; use a divisor"
        )
    shape = (*weight.shape[:axis], experts, size // experts, *weight.shape[axis + 1 :])
    return np.moveaxis(weight.reshape(shape), axis, 0)


def _join(weight: np.ndarray, axis: int, experts: int, order: Any) -> np.ndarray:
    weight = np.moveaxis(weight, 0, axis)
    size = experts * weight.shape[axis + 1]
    weight = weight.reshape(*weight.shape[:axis], size, *weight.shape[axis + 2 :])
    if order is not None:
        weight = np.take(weight, order, axis)
    return weight[None]


def _check_order(order: np.ndarray | None, config: ModelConfig) -> None:
    if order is None:
        return
    shape = (config.num_layers, config.d_ff)
    if order.shape != shape or (np.sort(order) != np.arange(shape[1])).any():
        raise ConfigError(
            f"the order of neurons is {list(order.shape)}; it takes a permutation of "
            f"0 to {shape[1] - 1} for each of {shape[0]} layers"
        )


def _fit(params: Arrays, config: ModelConfig) -> Arrays:
    """Return the parameters of `config`'s model, routers added as zeros."""
    routers = {
        name: np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in param_shapes(config).items()
        if _ROUTER in name
    }
    fitted = routers | {n: np.ascontiguousarray(a) for n, a in params.items()}
    check_params(config, fitted)
    return {name: fitted[name] for name in param_shapes(config)}
