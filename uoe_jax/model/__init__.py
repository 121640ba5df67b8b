"""Transformers whose blocks are dense, unions of experts or mixtures of experts."""

from __future__ import annotations

import jax
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.model.balance import Aux, router_losses, update_router_bias
from uoe_jax.model.cache import Cache, init_cache
from uoe_jax.model.encoder import Encoder
from uoe_jax.model.router import RouterBias
from uoe_jax.model.transformer import Decoder, routing_choices
from uoe_jax.model.vision import VisionTransformer

__all__ = [
    "Aux",
    "Cache",
    "Decoder",
    "Encoder",
    "RouterBias",
    "VisionTransformer",
    "init_cache",
    "make_model",
    "router_losses",
    "routing_choices",
    "update_router_bias",
]

KINDS = {"decoder": Decoder, "encoder": Encoder, "vision": VisionTransformer}


def make_model(config: ModelConfig, key: jax.Array) -> nnx.Module:
    """Return the model a config describes, initialised from a `jax.random.key`."""
    return KINDS[config.kind](config, rngs=nnx.Rngs(key))
