"""How much of a layer's output its chosen experts leave out, on data of their own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uoe_jax.decompose.route import output_lengths


class LayerError(NamedTuple):
    """A layer's error, |written - wanted| / |wanted| over all tokens together."""

    routed: float  # as its router chooses
    oracle: float  # had each token the experts that write most for it


def layer_error(
    neurons: Float[np.ndarray, "N F"] | Float[Array, "N F"],
    wanted: Float[np.ndarray, "N D"] | Float[Array, "N D"],
    w_down: Float[np.ndarray, "F D"] | Float[Array, "F D"],
    gates: Float[np.ndarray, "N E"] | Float[Array, "N E"],
) -> LayerError:
    """Return how far a layer's chosen experts are from what is wanted of it.

    `gates` are 0 where an expert isn't chosen. Neurons and `w_down` are in the experts'
    order. The oracle chooses as many experts as the gates do, always-on ones among
    them, with gates of 1.
    """
    arrays = (jnp.asarray(a, jnp.float32) for a in (neurons, wanted, w_down, gates))
    with jax.default_matmul_precision("highest"):
        routed, oracle = _errors(*arrays)
    return LayerError(float(routed), float(oracle))


@jax.jit
def _errors(
    neurons: Float[Array, "N F"],
    wanted: Float[Array, "N D"],
    w_down: Float[Array, "F D"],
    gates: Float[Array, "N E"],
) -> tuple[Array, Array]:
    experts = gates.shape[1]
    parts = neurons.reshape(len(neurons), experts, -1)
    weight = w_down.reshape(experts, -1, w_down.shape[1])
    on = lambda gates: (parts * gates[..., None]).reshape(neurons.shape) @ w_down
    length = jnp.maximum(jnp.linalg.norm(wanted), 1e-30)
    error = lambda gates: jnp.linalg.norm(on(gates) - wanted) / length
    lengths = output_lengths(neurons, weight)
    always = (gates != 0).all(axis=0)
    order = jnp.argsort(-jnp.where(always, jnp.inf, lengths), axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    most = (gates != 0).sum(axis=1, keepdims=True)
    return error(gates), error((place < most).astype(jnp.float32))
