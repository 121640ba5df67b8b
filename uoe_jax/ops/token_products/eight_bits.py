"""Weights of eight bits: whole numbers from -127 to 127 and a scale for each output.

A weight is its number times the scale of its output, half a scale off at most; sums are
multiplied by the scale, so that no weights are made again. Per-channel, symmetric,
weights only (Jacob et al. 2018; Dettmers et al. 2022 without their outliers).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

LARGEST = 127


def to_int8(
    weight: Float[Array, "*N I"],
) -> tuple[Int8[Array, "*N I"], Float32[Array, "*N"]]:
    """Return whole numbers, and the scale of each row of them."""
    wide = weight.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.where(most > 0, most / LARGEST, 1.0)
    numbers = jnp.round(wide / scales[..., None])
    return jnp.clip(numbers, -LARGEST, LARGEST).astype(jnp.int8), scales


def in_int8(part: Any, dtype: Any) -> Any:
    """Return a Projection or Addition with weights of eight bits, biases in a dtype."""
    numbers, scales = to_int8(part.weight)
    bias = None if part.bias is None else part.bias.astype(dtype)
    return dataclasses.replace(part, weight=numbers, bias=bias, scales=scales)
