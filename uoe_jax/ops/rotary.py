"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(
    x: Float[Array, "*N K H"], positions: Int[Array, "*N"], theta: float
) -> Float[Array, "*N K H"]:
    """Rotate pairs (i, i + H/2) of x by `position * theta**(-2i/H)`.

    The gradient rotates back by the same angles, so that only the integer positions
    are kept for the backward pass, not the sines of every row.
    """
    return _rotate(x, positions, theta)


def cosines_and_sines(
    positions: Int[Array, "*N"], width: int, theta: float
) -> tuple[Float32[Array, "*N half"], Float32[Array, "*N half"]]:
    """Return those of the angles that heads of `width` are rotated by."""
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    shape = (1,) * positions.ndim + (half,)
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(shape)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, positions: Array, theta: float) -> Array:
    cos, sin = cosines_and_sines(positions[..., None], x.shape[-1], theta)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _rotate_fwd(x: Array, positions: Array, theta: float) -> tuple[Array, Array]:
    return _rotate(x, positions, theta), positions


def _rotate_bwd(theta: float, positions: Array, grad: Array) -> tuple[Array, None]:
    # Else XLA finds these angles' sines in the forward pass and keeps them until here.
    positions, grad = jax.lax.optimization_barrier((positions, grad))
    return _rotate(grad, -positions, theta), None


rotate.defvjp(_rotate_fwd, _rotate_bwd)
