"""Products of single tokens with the experts they picked, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.numerics import accumulator_dtype

# All experts are multiplied where that is at most so many times what was picked: a
# gather copies the weights, which costs about as much.
ALL = 4


def project(
    x: Float[Array, "B I"], projection: Any, norm: Any, picks: Any, dtype: Any
) -> Float[Array, "B S O"]:
    """Return act(norm(x) weight + bias) of each row's slots."""
    if norm is not None:
        x = rms_norm(x, norm.scale, norm.eps)
    weight, bias, scales = projection.weight, projection.bias, projection.scales
    wide = accumulator_dtype(x.dtype)
    chosen = None if picks is None or not picks.by_pick else picks.experts
    if chosen is not None and chosen.size * ALL < weight.shape[0]:
        sums = _contract("bi,bxsoi->bxso", x, weight[chosen])
        if scales is not None:
            sums = sums * scales[chosen]
        if bias is not None:
            sums = sums + bias[chosen].astype(wide)
    elif projection.apart:
        own = x.reshape(x.shape[0], weight.shape[1], -1)
        sums = _contract("bsi,soi->bso", own, weight[0])[:, None]
        if scales is not None:
            sums = sums * scales[None]
        if bias is not None:
            sums = sums + bias.astype(wide)[None]
    else:
        # One product of two matrices, as they are.
        flat = weight.reshape(-1, weight.shape[-1])
        sums = _contract("bi,oi->bo", x, flat).reshape(-1, *weight.shape[:-1])
        if scales is not None:
            sums = sums * scales[None]
        if bias is not None:
            sums = sums + bias.astype(wide)[None]
        if chosen is not None:
            sums = pick(sums, chosen)
    found = _activate(sums, projection.activation)
    if projection.activation != "none" and picks is not None:
        gates = picks.gates if picks.by_pick else picks.table
        found = found * gates[..., None].astype(wide)
    return found.astype(dtype)


def add(
    parts: Any, addition: Any, residual: Float[Array, "B O"], picks: Any
) -> Float[Array, "B O"]:
    """Return the residual plus the bias plus the products of all picks, summed."""
    value = join(parts, residual.dtype)
    weight, scales = addition.weight, addition.scales
    if picks is not None:
        gates = picks.gates if picks.by_pick else picks.table
        if addition.gated:
            value = value * gates[..., None].astype(value.dtype)
        if not picks.by_pick:  # the others may hold anything
            value = jnp.where(gates[..., None] != 0, value, 0)
    if picks is not None and picks.by_pick and weight.shape[1] > 1:
        if picks.experts.size * ALL < weight.shape[1]:
            weight = weight[:, picks.experts]
            if scales is None:
                found = _contract("bxi,obxi->bo", value, weight)
            else:
                sums = _contract("bxi,obxi->obx", value, weight)
                found = jnp.sum(sums * scales[:, picks.experts], axis=2).T
            return _finish(found, addition.bias, residual)
        value = spread(value, picks.experts, weight.shape[1])
    if scales is not None:
        found = jnp.sum(_contract("bei,oei->boe", value, weight) * scales[None], axis=2)
        return _finish(found, addition.bias, residual)
    flat = value.reshape(value.shape[0], -1)
    found = _contract("bi,oi->bo", flat, weight.reshape(weight.shape[0], -1))
    return _finish(found, addition.bias, residual)


def join(parts: Any, dtype: Any) -> Float[Array, "B S I"]:
    """Return whole values from their parts."""
    values = parts.values
    if values.shape[1] == 1:
        return values[:, 0].astype(dtype)
    heads = values.reshape(*values.shape[:2], -1, parts.width).astype(jnp.float32)
    # A slot that nobody wrote has no sums either: whatever it gives isn't used.
    shares = jax.nn.softmax(parts.sums * jnp.log(2.0), axis=1)
    whole = jnp.sum(heads * shares[..., None], axis=1)
    return whole.reshape(values.shape[0], *values.shape[2:]).astype(dtype)


def pick(values: Float[Array, "B E ..."], experts: Int[Array, "B X"]) -> Array:
    """Return what the picked experts have, in the order of the picks."""
    index = experts.reshape(*experts.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def spread(
    values: Float[Array, "B X I"], experts: Int[Array, "B X"], count: int
) -> Float[Array, "B E I"]:
    """Return the picks' values in the places of their experts, zeros elsewhere."""
    batch, _, width = values.shape
    row = jnp.arange(batch)[:, None]
    zeros = jnp.zeros((batch, count, width), values.dtype)
    return zeros.at[row, experts].set(values, unique_indices=True)


def rms_norm(
    x: Float[Array, "*N I"], scale: Float[Array, " I"], eps: float
) -> Float[Array, "*N I"]:
    """Return x over its root mean square, times scale, rounded once."""
    wide = x.astype(accumulator_dtype(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = scale.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * inverse * scale).astype(x.dtype)


def _contract(form: str, a: Array, b: Array) -> Array:
    if b.dtype == jnp.int8:
        b = b.astype(a.dtype)  # whole numbers, which every dtype has
    return jnp.einsum(form, a, b, preferred_element_type=accumulator_dtype(a.dtype))


def _activate(sums: Float[Array, "B S side O"], activation: str) -> Array:
    if activation == "swiglu":
        return jax.nn.silu(sums[:, :, 1]) * sums[:, :, 0]
    sums = sums[:, :, 0]
    if activation == "none":
        return sums
    return jax.nn.gelu(sums, approximate=activation == "gelu")


def _finish(found: Array, bias: Array | None, residual: Array) -> Array:
    """Return products and their bias, rounded, added to the residual."""
    found = found.astype(residual.dtype)
    if bias is not None:
        found = found + bias.astype(found.dtype)[None]
    return residual + found
