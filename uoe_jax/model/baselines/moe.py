"""Mixture-of-experts baselines: whole MLPs as experts, top-k of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import choose
from uoe_jax.model.mlp import RoutedMlp
from uoe_jax.model.routing.expert_choice import ExpertChoiceRouter
from uoe_jax.model.routing.token import PatchRouter, pick_scores


def moe_gates(
    scores: Float[Array, "*N E"], picks: Int[Array, "*N X"], gate: str
) -> Float[Array, "*N X"]:
    """Return the gates of a mixture's picked experts.

    softmax: over the chosen, summing to 1 (Mixtral, Jiang et al. 2024, eq. 1).
    softmax_all: of all experts, as it is (Switch, Fedus et al. 2021, eq. 2). sigmoid:
    affinities normalised over the chosen (DeepSeek-V3, eq. 13 to 15).
    """
    if gate == "softmax_all":
        return pick_scores(jax.nn.softmax(scores, axis=-1), picks)
    normalise = choose("moe.gate", gate, _NORMALISE)
    return normalise(pick_scores(scores, picks))


def _softmax(chosen: Array) -> Array:
    return jax.nn.softmax(chosen, axis=-1)


def _affinities(chosen: Array) -> Array:
    affinity = jax.nn.sigmoid(chosen)
    return affinity / (jnp.sum(affinity, axis=-1, keepdims=True) + 1e-20)


_NORMALISE = {"softmax": _softmax, "sigmoid": _affinities}


class MoeRouter(PatchRouter):
    """Token choice with a mixture's gates."""

    def choose(self, scores: Float[Array, "*N E"]) -> Int[Array, "*N X"]:
        """Return the experts picked; biases add to what the gates are made of."""
        # DeepSeek-V3, eq. 16: the bias of loss-free balance is in units of affinity.
        return super().choose(
            jax.nn.sigmoid(scores) if self.gate == "sigmoid" else scores
        )

    def gates(
        self, scores: Float[Array, "*N E"], picks: Int[Array, "*N X"]
    ) -> Float[Array, "*N X"]:
        """Return the gates of the picked experts."""
        return moe_gates(scores, picks, self.gate)


class MoeExpertChoice(ExpertChoiceRouter):
    """Expert choice with a mixture's gates; `softmax_all` is the published form."""

    def gates(
        self, scores: Float[Array, "*N E"], picks: Int[Array, "*N X"]
    ) -> Float[Array, "*N X"]:
        """Return the gates of all experts."""
        return moe_gates(scores, picks, self.gate)


_ROUTERS = {"token": MoeRouter, "expert_choice": MoeExpertChoice}


class MoeMlp(RoutedMlp):
    """Mixture of whole MLPs.

    Covers Switch (top-1, `softmax_all`, a capacity), GShard's and Mixtral's top-2, and
    fine-grained experts with shared ones (DeepSeek-V3: `sigmoid`, `num_shared`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, width = config.moe, config.d_expert
        super().__init__(config, moe.num_experts, width, width, rngs=rngs)
        kind = choose("moe.router", moe.router, _ROUTERS)
        self.router = kind(config.d_model, moe, config.causal, rngs=rngs)
