"""What a half-step takes and tells, and what its kernels share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Hyper(NamedTuple):
    """Numbers that need no new compilation; n_j is an unknown's summed weight."""

    ridge: Float[Array, ""]  # the penalty is ridge * n_j**power
    bias_ridge: Float[Array, ""]
    power: Float[Array, ""]
    tol: Float[Array, ""]  # accuracy of an iterative half-step


class Stats(NamedTuple):
    """What a half-step saw and spent."""

    loss: Float[Array, ""]  # weighted squared error before the half-step
    max_steps: Int[Array, ""]  # iterations of the slowest problem
    entry_steps: Float[Array, ""]  # iterations summed over entries
    unknown_steps: Float[Array, ""]  # iterations summed over unknowns


class Fixed(NamedTuple):
    """The factor a half-step holds: its design matrix and what it needs beside it."""

    design: Float[Array, "M R"]
    shift: Float[Array, " M"]  # subtracted from the values
    scale: Float[Array, " R"]  # mean square of the design's columns


def gather(array: Array, index: Array) -> Array:
    """Return rows of `array`; zeros where the index is past the end."""
    return array.at[index].get(mode="fill", fill_value=0)


def summed(x: Array, axis_name: str | None) -> Array:
    """Return the sum over the devices of a mesh axis, if any."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def ridge_of(hyper: Hyper, degree: Array, rank: int, biases: bool) -> Array:
    """Return the ridge of each unknown's coefficients, `[..., rank (+1)]`."""
    grow = jnp.where(degree > 0, degree, 1) ** hyper.power
    ridge = jnp.broadcast_to(hyper.ridge, (rank,))
    if biases:
        ridge = jnp.concatenate([ridge, hyper.bias_ridge[None]])
    return grow[:, None] * ridge[None, :]
