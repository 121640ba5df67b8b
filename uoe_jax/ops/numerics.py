"""In which dtype sums are kept."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype sums are kept in: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)
