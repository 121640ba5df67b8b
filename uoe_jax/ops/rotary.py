"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.config import RopeScaling
from uoe_jax.errors import choose


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotate(
    x: Float[Array, "*N K H"],
    positions: Int[Array, "*N"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "*N K H"]:
    """Rotate pairs (i, i + H/2) of x by `position * theta**(-2i/H)`, stretched.

    The gradient rotates back by the same angles, so that only the integer positions
    are kept for the backward pass, not the sines of every row.
    """
    return _rotate(x, positions, theta, scaling)


def cosines_and_sines(
    positions: Int[Array, "*N"],
    width: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[Float32[Array, "*N half"], Float32[Array, "*N half"]]:
    """Return those of the angles that heads of `width` are rotated by."""
    frequency = frequencies(width, theta, scaling)
    shape = (1,) * positions.ndim + frequency.shape
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(shape)
    return jnp.cos(angle), jnp.sin(angle)


def frequencies(
    width: int, theta: float, scaling: RopeScaling | None = None
) -> Float32[Array, " half"]:
    """Return the angle a position of each pair of a head, stretched, in radians."""
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequency if scaling is None else stretch(frequency, scaling)


def stretch(
    frequency: Float32[Array, " half"], scaling: RopeScaling
) -> Float32[Array, " half"]:
    """Return frequencies stretched by a factor, of llama3 only the low ones.

    Llama 3 (Grattafiori et al. 2024): a wave that fits `high_freq_factor` times into
    the original length stays, one that doesn't fit `low_freq_factor` times is
    stretched whole, those between by parts.
    """
    long = frequency / scaling.factor
    if choose("kind", scaling.kind, {"linear": True, "llama3": False}):
        return long
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fits = scaling.original_max_seq_len * frequency / (2 * math.pi)
    share = jnp.clip((fits - low) / (high - low), 0.0, 1.0)
    return (1 - share) * long + share * frequency


def _rotate(
    x: Array, positions: Array, theta: float, scaling: RopeScaling | None
) -> Array:
    cos, sin = cosines_and_sines(positions[..., None], x.shape[-1], theta, scaling)
    return _turn(x, cos, sin)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _rotate_fwd(
    x: Array, positions: Array, theta: float, scaling: RopeScaling | None
) -> tuple[Array, Array]:
    return _rotate(x, positions, theta, scaling), positions


def _rotate_bwd(
    theta: float, scaling: RopeScaling | None, positions: Array, grad: Array
) -> tuple[Array, None]:
    # Else XLA finds these angles' sines in the forward pass and keeps them until here.
    positions, grad = jax.lax.optimization_barrier((positions, grad))
    return _rotate(grad, -positions, theta, scaling), None


rotate.defvjp(_rotate_fwd, _rotate_bwd)


@jax.custom_vjp
def rotate_pairs(
    x: Float[Array, "*N Q H"],
    positions: Int[Array, "*N"],
    frequency: Float32[Array, "K half"],
) -> Float[Array, "*N Q H"]:
    """Rotate pairs (i, i + H/2) of x by `position * frequency` of their key head.

    Each of the K key heads has Q/K heads of x, side by side. Frequencies are constants:
    they have no gradient.
    """
    groups = x.reshape(*x.shape[:-2], frequency.shape[0], -1, x.shape[-1])
    places = positions.astype(jnp.float32)[..., None, None, None]
    shape = (1,) * positions.ndim + (frequency.shape[0], 1, frequency.shape[1])
    angle = places * frequency.reshape(shape)
    return _turn(groups, jnp.cos(angle), jnp.sin(angle)).reshape(x.shape)


def _rotate_pairs_fwd(
    x: Array, positions: Array, frequency: Array
) -> tuple[Array, tuple[Array, Array]]:
    return rotate_pairs(x, positions, frequency), (positions, frequency)


def _rotate_pairs_bwd(
    saved: tuple[Array, Array], grad: Array
) -> tuple[Array, None, None]:
    # As in `_rotate_bwd`: sines are computed again rather than kept.
    (positions, frequency), grad = jax.lax.optimization_barrier((saved, grad))
    return rotate_pairs(grad, -positions, frequency), None, None


rotate_pairs.defvjp(_rotate_pairs_fwd, _rotate_pairs_bwd)
