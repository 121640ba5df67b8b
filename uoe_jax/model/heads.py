"""What encoders read at one token or at each: BERT's pooler and its head of tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig
from uoe_jax.model.layers import Norm, init_weight, output_logits, project
from uoe_jax.model.mlp import activate


class Linear(nnx.Module):
    """A square matrix with a bias."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.d_model
        self.weight = init_weight(rngs, (width, width), width, config)
        self.bias = nnx.Param(jnp.zeros(width, config.param_dtype))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return the product of each vector, plus the bias."""
        return project(x, self.weight[...], self.bias[...])


class Pooler(Linear):
    """A layer of tanh over the first token (Devlin et al. 2018, BERT)."""

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return the vector that stands for the sample."""
        return jnp.tanh(super().__call__(x))


class TokenHead(nnx.Module):
    """A token at each place, by a layer and the embeddings (BERT's masked tokens)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.exact = config.activation == "gelu_erf"
        self.transform = Linear(config, rngs=rngs)
        self.norm = Norm(config)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, config.param_dtype))

    def __call__(
        self, x: Float[Array, "*N D"], embedding: Float[Array, "V D"]
    ) -> Float[Array, "*N V"]:
        """Return float32 logits of the vocabulary."""
        x = self.norm(activate(self.transform(x), None, self.exact))
        return output_logits(x, embedding.T, self.bias[...])
