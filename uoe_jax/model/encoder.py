"""Encoder classifier."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.balance import Aux
from uoe_jax.model.context import make_context
from uoe_jax.model.embed import Head, TokenEmbedding, mean_pool
from uoe_jax.model.trunk import Trunk


class Encoder(nnx.Module):
    """Bidirectional transformer, mean over the tokens that are not padding, classes.

    Takes the options of `Decoder`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TokenEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        self.head = Head(config, config.num_classes, True, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B C"], Aux]:
        """Return float32 logits of the classes and router statistics."""
        context = make_context(self.config, tokens.shape, **options)
        x = self.embed(tokens, context.positions)
        x, aux = self.trunk(x, context)
        return self.head(mean_pool(x, context.segments)), aux
