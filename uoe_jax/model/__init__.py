"""Transformers whose blocks are dense, unions of experts or mixtures of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from uoe_jax import kinds
from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.errors import ConfigError, choose, shown
from uoe_jax.kinds import AttentionFacts, MlpFacts, RouterFacts
from uoe_jax.model.cache import Cache
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
from uoe_jax.tree import named_leaves
from uoe_jax.validation import validate_model

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
    "register_attention",
    "register_mlp",
    "register_router",
    "router_losses",
    "routing_choices",
    "split_model",
    "update_router_bias",
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


def _build(config: ModelConfig, key: jax.Array) -> Any:
    return choose("kind", config.kind, KINDS)(config, rngs=nnx.Rngs(key))


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
def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by name; nothing is computed."""
    return named_leaves(jax.eval_shape(split_model(config)[1])[0])


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
