"""RMSNorm and LayerNorm with statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig


def rms_norm(
    x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*N D"]:
    """Return x over its root mean square, times scale (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = scale.astype(x32.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * inverse * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*N D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
) -> Float[Array, "*N D"]:
    """Return x centred and divided by its deviation, scaled and shifted."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = scale.astype(x32.dtype).reshape(shape)
    bias = bias.astype(x32.dtype).reshape(shape)
    return (x32 * inverse * scale + bias).astype(x.dtype)


class Norm(nnx.Module):
    """The norm a config names, over the model width."""

    def __init__(self, config: ModelConfig):
        shape, dtype = (config.d_model,), config.param_dtype
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        centred = config.centred
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if centred else None

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return x normalised, in its own dtype."""
        if self.bias is None:
            return rms_norm(x, self.scale[...], self.eps)
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)
