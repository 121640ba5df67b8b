"""Vision transformer."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig
from uoe_jax.model.balance import Aux
from uoe_jax.model.context import make_context
from uoe_jax.model.embed import Head, PatchEmbedding, mean_pool
from uoe_jax.model.trunk import Trunk


class VisionTransformer(nnx.Module):
    """Bidirectional transformer over square patches of an image, mean pooled.

    Takes the options of `Decoder` but for positions and segments.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = PatchEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        self.head = Head(config, config.num_classes, True, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B Hi Wi Ci"], **options: Any
    ) -> tuple[Float[Array, "B C"], Aux]:
        """Return float32 logits of the classes and router statistics."""
        x = self.embed(images)
        context = make_context(self.config, x.shape[:2], **options)
        x, aux = self.trunk(x, context)
        return self.head(mean_pool(x, None)), aux
