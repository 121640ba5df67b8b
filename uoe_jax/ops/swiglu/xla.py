"""SwiGLU times a factor of each row in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(
    rows: Float[Array, "M O"], factors: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """Return silu(gate) * up * factor of rows, computed in the factors' dtype."""
    up, gate = jnp.split(rows.astype(factors.dtype), 2, axis=-1)
    return (jax.nn.silu(gate) * up * factors[:, None]).astype(rows.dtype)


def _swiglu_fwd(rows, factors):
    return swiglu(rows, factors), (rows, factors)


def _swiglu_bwd(saved, grad):
    rows, factors = saved
    up, gate = jnp.split(rows.astype(factors.dtype), 2, axis=-1)
    grad = grad.astype(factors.dtype)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    scaled = grad * factors[:, None]
    d_rows = jnp.concatenate([scaled * silu, scaled * up * slope], axis=-1)
    return d_rows.astype(rows.dtype), jnp.sum(grad * silu * up, axis=-1)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
