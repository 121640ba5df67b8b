"""In which dtype sums are kept, and rows times factors with such sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.varying import vary_together

# The name remat policy "dots" keeps: outputs of projections, never attention scores.
PROJECTION = "projection"


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype sums are kept in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def scale_rows(
    rows: Float[Array, "*S"], factors: Float[Array, "*#S"]
) -> Float[Array, "*S"]:
    """Return rows times their factors, which have one entry along their other axes.

    The gradient of a factor is summed in float32 or wider, whatever the rows are.
    """
    return _scale(*vary_together(rows, factors))


@jax.custom_vjp
def _scale(rows, factors):
    return rows * factors.astype(rows.dtype)


def _scale_fwd(rows, factors):
    return _scale(rows, factors), (rows, factors)


def _scale_bwd(saved, grad):
    rows, factors = saved
    wide = accumulator_dtype(rows.dtype)
    axes = tuple(axis for axis in range(rows.ndim) if factors.shape[axis] == 1)
    total = jnp.sum(grad.astype(wide) * rows.astype(wide), axis=axes, keepdims=True)
    return grad * factors.astype(rows.dtype), total.astype(factors.dtype)


_scale.defvjp(_scale_fwd, _scale_bwd)
