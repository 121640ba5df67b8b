"""The router that a union's config names."""

from __future__ import annotations

from typing import Any

from flax import nnx

from uoe_jax.config import UnionConfig
from uoe_jax.model.routing.expert_choice import ExpertChoiceRouter
from uoe_jax.model.routing.selection import HierarchicalRouter, SelectionRouter
from uoe_jax.model.routing.threshold import ThresholdRouter
from uoe_jax.model.routing.token import PatchRouter

ROUTERS: dict[str, Any] = {
    "token": PatchRouter,
    "expert_choice": ExpertChoiceRouter,
    "selection": SelectionRouter,
    "hierarchical": HierarchicalRouter,
    "threshold": ThresholdRouter,
}


def make_router(
    d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
) -> Any:
    """Return a new `Router`; ConfigError where a causal model can't use its kind."""
    return ROUTERS[config.router](d_model, config, causal, rngs=rngs)
