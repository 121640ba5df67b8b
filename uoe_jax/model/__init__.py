"""Transformers whose blocks are dense, unions of experts or mixtures of experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax import kinds
from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.errors import ConfigError, choose, shown
from uoe_jax.kinds import AttentionFacts, MlpFacts, RouterFacts
from uoe_jax.model.cache import Cache
from uoe_jax.model.layers import NoDraws
from uoe_jax.model.routing import ROUTERS
from uoe_jax.model.routing.balance import Aux, router_losses, update_router_bias
from uoe_jax.model.routing.token import RouterBias
from uoe_jax.model.transformer import (
    ATTENTION,
    MLP,
    Decoder,
    Encoder,
    VisionTransformer,
    init_cache,
    routing_choices,
)
from uoe_jax.tree import Arrays, fill_leaves, named_leaves
from uoe_jax.validation import validate_model
from uoe_jax.weights import rotary_pairs

__all__ = [
    "Aux",
    "Cache",
    "Decoder",
    "Encoder",
    "RouterBias",
    "VisionTransformer",
    "abstract_model",
    "check_pairs",
    "check_params",
    "flat_buffers",
    "flat_params",
    "init_cache",
    "make_model",
    "param_shapes",
    "register_attention",
    "register_mlp",
    "register_router",
    "router_losses",
    "routing_choices",
    "split_model",
    "update_router_bias",
    "whole_buffers",
    "with_params",
    "with_top_k",
]

KINDS = {"decoder": Decoder, "encoder": Encoder, "vision": VisionTransformer}


def make_model(
    config: ModelConfig | ExperimentConfig, key: jax.Array | int | None = None
) -> Decoder | Encoder | VisionTransformer:
    """Return the model a config describes, initialised from a key or a seed.

    Args:
      config: of a model, or of an experiment.
      key: a `jax.random.key`, or a seed. Without one the experiment's own seed is
        taken, so that this is the model its training starts with; 0 for a model.

    Raises:
      ConfigError: a config or a seed that can't be.
    """
    if isinstance(config, ExperimentConfig):
        key = config.train.seed if key is None else key
        config = config.model
    validate_model(config)
    return _build(config, _as_key(0 if key is None else key))


def _build(config: ModelConfig, key: jax.Array, kind: type[nnx.Rngs] = nnx.Rngs) -> Any:
    return choose("kind", config.kind, KINDS)(config, rngs=kind(key))


def _as_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array):
        return key
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**32:
        raise ConfigError(
            f"key is {shown(key)}; give jax.random.key(0), or a seed from 0 to "
            f"{2**32 - 1}"
        )
    return jax.random.key(key)


def split_model(
    config: ModelConfig, seed: int = 0
) -> tuple[nnx.GraphDef, Callable[[], Any]]:
    """Return a model's static half and a function that makes (params, buffers)."""

    def make() -> Any:
        return nnx.split(_build(config, jax.random.key(seed)), nnx.Param, ...)

    return jax.eval_shape(make)[0], lambda: make()[1:]


@functools.cache
def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, Any, Any]:
    """Return a model's static half, and the shapes of its parameters and buffers.

    Traced once: many unequal layers take a second.
    """
    build = lambda: _build(config, jax.random.key(0), NoDraws)
    return jax.eval_shape(lambda: nnx.split(build(), nnx.Param, ...))


@functools.cache
def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by name; nothing is computed."""
    return named_leaves(abstract_model(config)[1])


def flat_params(model: nnx.Module) -> Arrays:
    """Return host copies of a model's parameters by name."""
    params = named_leaves(nnx.split(model, nnx.Param, ...)[1])
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def flat_buffers(model: nnx.Module) -> Arrays:
    """Return host copies of what a model has beside its parameters, by name.

    The routers' biases, and of narrow heads the pairs that are rotated.
    """
    rest = named_leaves(nnx.split(model, nnx.Param, ...)[2])
    return {name: np.asarray(leaf) for name, leaf in rest.items()}


def with_params(
    config: ModelConfig,
    params: Mapping[str, Any],
    buffers: Mapping[str, Any] | None = None,
) -> Any:
    """Return a config's model with the given parameters and buffers.

    Buffers are as `whole_buffers` says. Raises ConfigError for parameters that are
    missing, too many or of another shape, and for pairs that can't be.
    """
    check_params(config, params)
    graphdef, shapes, biases = abstract_model(config)
    cast = lambda tree, arrays: {
        name: jnp.asarray(arrays[name], leaf.dtype)
        for name, leaf in named_leaves(tree).items()
    }
    filled = (
        fill_leaves(shapes, cast(shapes, params)),
        fill_leaves(biases, cast(biases, whole_buffers(config, buffers or {}))),
    )
    return nnx.merge(graphdef, *filled)


def with_top_k(model: Any, top_k: int) -> Any:
    """Return a model with the same weights whose unions have `top_k` experts on.

    One that was trained with `least_top_k` is good at each number from there to its
    `top_k`. Raises ConfigError for a number that its unions can't have.
    """
    config: ModelConfig = model.config
    union = dataclasses.replace(config.union, top_k=top_k, least_top_k=0)
    own = config.union_attention
    attention = dataclasses.replace(
        own, top_k=own.top_k and top_k, least_top_k=own.least_top_k and 0
    )
    config = dataclasses.replace(config, union=union, union_attention=attention)
    validate_model(config)
    found = nnx.merge(split_model(config)[0], *nnx.split(model, nnx.Param, ...)[1:])
    if config.kind == "decoder":
        found.decode_weights = model.decode_weights
    return found


def whole_buffers(config: ModelConfig, given: Mapping[str, Any]) -> Arrays:
    """Return the given buffers of a config's model and what is missing, by name.

    The routers' balance biases, zero where they are missing; and of narrow heads the
    pairs that are rotated, [layers, K, key_dim / 2] integers: the first ones. Raises
    ConfigError for pairs that aren't of a head, or that a head has twice.
    """
    pairs, whole = rotary_pairs(config), {}
    leaves = named_leaves(abstract_model(config)[2])
    for name, leaf in leaves.items():
        value = given.get(name)
        if value is None:
            first = np.arange(leaf.shape[-1]) if name in pairs else 0
            value = np.broadcast_to(first, leaf.shape)
        elif name in pairs:
            _check_pairs(name, np.asarray(value), leaf.shape, config.head_dim // 2)
        whole[name] = np.asarray(value, leaf.dtype)
    return whole


def _check_pairs(
    name: str, pairs: np.ndarray, shape: tuple[int, ...], count: int
) -> None:
    """Raise ConfigError unless each head keeps other ones of its `count` pairs."""
    if pairs.shape != shape or pairs.dtype.kind not in "iu":
        raise ConfigError(
            f"{name} is {list(pairs.shape)} of {pairs.dtype}; it must be {list(shape)} "
            "integers, the pairs that each key head keeps"
        )
    _check_places(name, pairs, count)


def check_pairs(config: ModelConfig, buffers: Mapping[str, Any]) -> None:
    """Raise ConfigError where buffers have pairs that a head hasn't, or has twice.

    Of arrays on several processes each checks its part.
    """
    for name in rotary_pairs(config).keys() & buffers.keys():
        shards = getattr(buffers[name], "addressable_shards", None)
        for part in [buffers[name]] if shards is None else [s.data for s in shards]:
            _check_places(name, np.asarray(part), config.head_dim // 2)


def _check_places(name: str, pairs: np.ndarray, count: int) -> None:
    ordered = np.sort(pairs, axis=-1)
    if ordered.min() < 0 or ordered.max() >= count:
        raise ConfigError(
            f"{name} has pairs {ordered.min()} to {ordered.max()}; a head of the "
            f"model's width has 0 to {count - 1}"
        )
    if np.any(ordered[..., 1:] == ordered[..., :-1]):
        raise ConfigError(f"{name} names a pair of a head twice; name each once")


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Raise ConfigError unless parameters by name are those of a config's model."""
    wanted = {name: leaf.shape for name, leaf in param_shapes(config).items()}
    found = {name: tuple(np.shape(array)) for name, array in params.items()}
    show = lambda shapes, name: list(shapes[name]) if name in shapes else "absent"
    problems = [
        f"{name} is {show(found, name)}, expected {show(wanted, name)}"
        for name in [*wanted, *(n for n in found if n not in wanted)]
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ConfigError(
            f"these aren't the model's parameters: {'; '.join(problems[:6])}{more}; "
            "they and the config must describe the same sizes"
        )


def register_router(name: str, router: type, facts: RouterFacts) -> None:
    """Add a router, so that `UnionConfig(router=name)` builds it.

    `router` is a `uoe_jax.model.routing.token.Router`: it takes (d_model, config,
    causal, rngs=), returns the `Routing` of a call, and of a token in `decode`. `facts`
    say what it sees and costs. Raises ConfigError for a name that is taken.
    """
    _register(name, router, facts, (kinds.ROUTERS, ROUTERS, RouterFacts))


def register_attention(name: str, attention: type, facts: AttentionFacts) -> None:
    """Add an attention, so that `ModelConfig(attention=(name,))` builds it.

    `attention` is a module that takes (config, rngs=); a call returns output,
    statistics, and keys and values; `decode` and `cache_shapes` are those of
    `DenseAttention`. Raises ConfigError for a name that is taken.
    """
    _register(name, attention, facts, (kinds.ATTENTIONS, ATTENTION, AttentionFacts))


def register_mlp(name: str, mlp: type, facts: MlpFacts) -> None:
    """Add an MLP, so that `ModelConfig(mlp=(name,))` builds it.

    `mlp` is a module that takes (config, rngs=); a call returns output and statistics;
    `decode` is that of `DenseMlp`. Raises ConfigError for a name that is taken.
    """
    _register(name, mlp, facts, (kinds.MLPS, MLP, MlpFacts))


def _register(name: str, part: type, facts: Any, tables: tuple[Any, Any, type]) -> None:
    known, classes, kind = tables
    for method in ("__call__", "decode"):
        if not any(method in vars(base) for base in getattr(part, "__mro__", ())):
            raise ConfigError(
                f"kind {name!r} is {shown(part)} without {method}; see register_* for "
                "what its class needs"
            )
    kinds.add_kind(known, name, facts, kind)
    classes[name] = part
    for known_models in (abstract_model, param_shapes):
        known_models.cache_clear()  # the name may have meant another class before
