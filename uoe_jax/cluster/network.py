"""The network of MLC: one backbone with a head for features and one for clusters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class TwoHeads(nnx.Module):
    """Points to rows of length 1: features Z, and C whose products are affinities."""

    def __init__(self, inputs: int, hidden: int, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.features = nnx.Linear(hidden, width, rngs=rngs)
        self.clusters = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "N P"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """Return Z and C."""
        x = nnx.gelu(self.second(nnx.gelu(self.first(x))))
        return unit_rows(self.features(x)), unit_rows(self.clusters(x))


@functools.partial(jax.jit, static_argnums=0)
def run_network(
    graph: Any, state: Any, x: Float[Array, "N P"]
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Return what the network of a graph and its weights makes of points."""
    return nnx.merge(graph, state)(x)


def unit_rows(x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Return rows scaled to length 1; rows of zeros stay, with finite gradients."""
    square = jnp.square(x).sum(axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
