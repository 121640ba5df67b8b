"""Transformers whose blocks are dense, unions of experts or mixtures of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.errors import choose
from uoe_jax.model.cache import Cache
from uoe_jax.model.routing.balance import Aux, router_losses, update_router_bias
from uoe_jax.model.routing.token import RouterBias
from uoe_jax.model.transformer import (
    Decoder,
    Encoder,
    VisionTransformer,
    init_cache,
    routing_choices,
)
from uoe_jax.tree import named_leaves

__all__ = [
    "Aux",
    "Cache",
    "Decoder",
    "Encoder",
    "RouterBias",
    "VisionTransformer",
    "init_cache",
    "make_model",
    "param_shapes",
    "router_losses",
    "routing_choices",
    "split_model",
    "update_router_bias",
]

KINDS = {"decoder": Decoder, "encoder": Encoder, "vision": VisionTransformer}


def make_model(config: ModelConfig, key: jax.Array) -> nnx.Module:
    """Return the model a config describes, initialised from a `jax.random.key`."""
    return choose("kind", config.kind, KINDS)(config, rngs=nnx.Rngs(key))


def split_model(
    config: ModelConfig, seed: int = 0
) -> tuple[nnx.GraphDef, Callable[[], Any]]:
    """Return a model's static half and a function that makes (params, buffers)."""

    def make() -> Any:
        return nnx.split(make_model(config, jax.random.key(seed)), nnx.Param, ...)

    return jax.eval_shape(make)[0], lambda: make()[1:]


@functools.cache
def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by name; nothing is computed."""
    return named_leaves(jax.eval_shape(split_model(config)[1])[0])
