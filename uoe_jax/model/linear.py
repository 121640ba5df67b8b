"""Weight initialisation and the projections that dense and packed layers share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.ops._dispatch import accumulator_dtype, vary_together
from uoe_jax.ops.packing import Packing, take_rows

# The name remat policy "dots" keeps: outputs of projections, never attention scores.
PROJECTION = "projection"

# Standard deviation of a unit normal truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def init_weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    fan_in: int,
    config: ModelConfig,
    scale: float = 1.0,
) -> nnx.Param:
    """Return a truncated normal weight of standard deviation `scale / sqrt(fan_in)`.

    A part of a dense layer states the fan-in of the whole layer, so that a union of
    parts starts as the dense layer it decomposes.
    """
    value = truncated_normal(rngs, shape, scale / fan_in**0.5)
    return nnx.Param(value.astype(config.param_dtype))


def truncated_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float
) -> Float[Array, "*shape"]:
    """Return normal values cut at two deviations, of standard deviation `std`."""
    # Drawn flat: the generator takes a second to compile, once for each size.
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (math.prod(shape),))
    return (draw * (std / _TRUNCATED_STD)).reshape(shape)


def init_bias(
    shape: tuple[int, ...], config: ModelConfig, use: bool | None = None
) -> nnx.Param | None:
    """Return zeros, or None where the config has no biases."""
    if not (config.use_bias if use is None else use):
        return None
    return nnx.Param(jnp.zeros(shape, config.param_dtype))


def residual_scale(config: ModelConfig) -> float:
    """Return the factor 1/sqrt(2L) of projections that write to the residual."""
    return (2 * config.num_layers) ** -0.5


def project(
    x: Float[Array, "*N I"],
    weight: Float[Array, "I O"],
    bias: Float[Array, " O"] | None = None,
) -> Float[Array, "*N O"]:
    """Return `x @ weight + bias` in the dtype of x."""
    out = jnp.dot(x, weight.astype(x.dtype))
    if bias is not None:
        out = out + _expand(bias.astype(x.dtype), out.ndim)
    return checkpoint_name(out, PROJECTION)


def add_expert_bias(
    rows: Float[Array, "M O"], bias: Float[Array, "E O"], packing: Packing
) -> Float[Array, "M O"]:
    """Add to each packed row the bias of its expert."""
    # A product with one-hot rows: its gradient is a product too, not a scatter.
    num_experts = bias.shape[0]
    one_hot = jax.nn.one_hot(row_experts(packing), num_experts, dtype=jnp.float32)
    bias32 = bias.astype(jnp.float32)
    added = jnp.dot(one_hot, bias32, precision=jax.lax.Precision.HIGHEST)
    return rows + added.astype(rows.dtype)


def row_experts(packing: Packing) -> Int[Array, " M"]:
    """Return the expert of every packed row."""
    row = jnp.arange(packing.token_ids.shape[0])
    return jnp.searchsorted(packing.group_offsets[1:], row, side="right")


def picks_to_rows(
    values: Float[Array, "N X ..."], packing: Packing
) -> Float[Array, "M ..."]:
    """Return per-pick values in packed order. The gradient is `rows_to_picks`."""
    flat = packing.row_ids.reshape(-1)
    picks = jnp.arange(flat.size, dtype=flat.dtype)
    # Picks past the last row have no place: dropped.
    order = jnp.zeros(packing.token_ids.shape, flat.dtype)
    order = order.at[flat].set(picks, unique_indices=True, mode="drop")
    return _place(*vary_together(values, order, packing.row_ids))


@jax.custom_vjp
def _place(values, order, row_ids):
    values = values.reshape(row_ids.size, *values.shape[2:])
    return values.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _place_fwd(values, order, row_ids):
    return _place(values, order, row_ids), row_ids


def _place_bwd(row_ids, grad):
    # Both ways are known, so the gradient is a gather too: a scatter of scalars takes
    # longer than the products it comes with.
    return take_rows(grad, row_ids), None, None


_place.defvjp(_place_fwd, _place_bwd)


def rows_to_picks(
    rows: Float[Array, "M ..."], packing: Packing
) -> Float[Array, "N X ..."]:
    """Return packed rows as each token's picks, in the order it picked them."""
    return take_rows(rows, packing.row_ids)


def row_gates(gates: Float[Array, "B T X"], packing: Packing) -> Float[Array, " M"]:
    """Return each packed row's gate, that of its pick."""
    return picks_to_rows(gates.reshape(-1, gates.shape[-1]), packing)


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


def fold_key(key: jax.Array | None, number: int | Array) -> jax.Array | None:
    """Return the key folded with a number, or None without a key."""
    return None if key is None else jax.random.fold_in(key, number)


def dropout(
    x: Float[Array, "*N D"], rate: float, key: jax.Array | None
) -> Float[Array, "*N D"]:
    """Zero entries with probability `rate` and rescale; without a key return x."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _expand(x: Array, ndim: int) -> Array:
    """Add leading axes: implicit rank promotion is off in the tests."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
