"""Token and image-patch embeddings, learned positions and the output head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.linear import init_bias, init_weight, project


class LearnedPosition(nnx.Module):
    """A learned vector for each position, added to the embeddings."""

    def __init__(self, config: ModelConfig, length: int, *, rngs: nnx.Rngs):
        shape = (length, config.d_model)
        self.embedding = init_weight(rngs, shape, config.d_model, config)

    def __call__(
        self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
    ) -> Float[Array, "*N D"]:
        """Return x plus the vectors of its positions."""
        return x + self.embedding[...][positions].astype(x.dtype)


def learned_position(
    config: ModelConfig, length: int, *, rngs: nnx.Rngs
) -> LearnedPosition | None:
    """Return learned positions, or None where the config has rotary ones."""
    if config.rotates:
        return None
    return LearnedPosition(config, length, rngs=rngs)


class TokenEmbedding(nnx.Module):
    """Vectors of tokens, and of positions where these are learned."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.dtype = config.compute_dtype
        self.embedding = init_weight(rngs, shape, config.d_model, config)
        self.position = learned_position(config, config.max_seq_len, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "*N"], positions: Int[Array, "*N"]
    ) -> Float[Array, "*N D"]:
        """Return the embeddings in the compute dtype."""
        x = self.embedding[...][tokens].astype(self.dtype)
        return x if self.position is None else self.position(x, positions)


class PatchEmbedding(nnx.Module):
    """Square patches of an image, one token each (Dosovitskiy et al. 2020, ViT)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.side, self.dtype = config.image_patch, config.compute_dtype
        width = config.image_channels * config.image_patch**2
        shape = (width, config.d_model)
        self.weight = init_weight(rngs, shape, width, config)
        self.bias = nnx.Param(jnp.zeros(config.d_model, config.param_dtype))
        length = (config.image_size // config.image_patch) ** 2
        self.position = learned_position(config, length, rngs=rngs)

    def __call__(self, images: Float[Array, "B Hi Wi Ci"]) -> Float[Array, "B T D"]:
        """Return one token per patch, row by row."""
        batch, height, width, channels = images.shape
        side = self.side
        rows, columns = height // side, width // side
        x = images.reshape(batch, rows, side, columns, side, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = project(x.astype(self.dtype), self.weight[...], self.bias[...])
        if self.position is None:
            return x
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        return self.position(x, positions)


class Head(nnx.Module):
    """Linear map to the vocabulary or, with a bias, to classes; logits in float32."""

    def __init__(
        self, config: ModelConfig, num_outputs: int, use_bias: bool, *, rngs: nnx.Rngs
    ):
        shape = (config.d_model, num_outputs)
        self.weight = init_weight(rngs, shape, config.d_model, config)
        self.bias = init_bias((num_outputs,), config, use=use_bias)

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Return float32 logits."""
        bias = None if self.bias is None else self.bias[...]
        return output_logits(x, self.weight[...], bias)


def output_logits(
    x: Float[Array, "*N D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None = None,
) -> Float[Array, "*N V"]:
    """Return x times weight, accumulated in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.dot(x, weight.astype(x.dtype), preferred_element_type=dtype)
    if bias is None:
        return out
    return out + bias.astype(dtype).reshape((1,) * (out.ndim - 1) + (-1,))


def mean_pool(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """Return the mean over the tokens that are not padding."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if segments is None:
        return jnp.mean(x32, axis=1).astype(x.dtype)
    valid = (segments != 0)[..., None].astype(x32.dtype)
    total = jnp.sum(x32 * valid, axis=1)
    return (total / jnp.maximum(jnp.sum(valid, axis=1), 1.0)).astype(x.dtype)
