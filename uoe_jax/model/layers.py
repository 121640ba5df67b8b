"""Layers that every model has: initialisation, projections, norms, embeddings.

And what moves packed rows: gates and biases of the experts that own them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.ops import float8
from uoe_jax.ops.numerics import PROJECTION
from uoe_jax.ops.packing import Packing, take_rows
from uoe_jax.varying import vary_together

# Standard deviation of a unit normal truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


class NoDraws(nnx.Rngs):
    """Randomness of a model of which only shapes are asked: weights are zeros.

    Tracing a generator for every weight takes most of the time of tracing a model.
    """


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
    if isinstance(rngs, NoDraws):
        return jnp.zeros(shape)
    # Drawn flat: the generator takes a second to compile, once for each size.
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (math.prod(shape),))
    return (draw * (std / _TRUNCATED_STD)).reshape(shape)


def init_bias(
    shape: tuple[int, ...], config: ModelConfig, use: bool
) -> nnx.Param | None:
    """Return zeros, or None where there is no bias to `use`."""
    if not use:
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
    """Return `x @ weight + bias` in the dtype of x.

    Within `float8_products` of operands rounded to eight bits.
    """
    out = float8.matmul(x, weight.astype(x.dtype))
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


def rms_norm(
    x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*N D"]:
    """Return x over its root mean square, times scale (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = scale.astype(x32.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * inverse * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*N D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
) -> Float[Array, "*N D"]:
    """Return x centred and divided by its deviation, scaled and shifted."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = scale.astype(x32.dtype).reshape(shape)
    bias = bias.astype(x32.dtype).reshape(shape)
    return (x32 * inverse * scale + bias).astype(x.dtype)


class Norm(nnx.Module):
    """The norm a config names, over the model width."""

    def __init__(self, config: ModelConfig):
        shape, dtype = (config.d_model,), config.param_dtype
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        centred = config.centred
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if centred else None

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return x normalised, in its own dtype."""
        if self.bias is None:
            return rms_norm(x, self.scale[...], self.eps)
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class HeadNorm(nnx.Module):
    """RMS norm of each head, with one scale for all (Qwen3, OLMo 2)."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((config.key_dim,), config.param_dtype))

    def __call__(self, x: Float[Array, "*N H"]) -> Float[Array, "*N H"]:
        """Return x normalised, in its own dtype."""
        return rms_norm(x, self.scale[...], self.eps)


class LearnedPosition(nnx.Module):
    """A learned vector for each position, added to the embeddings."""

    def __init__(self, config: ModelConfig, length: int, *, rngs: nnx.Rngs):
        shape = (length, config.d_model)
        self.embedding = init_weight(rngs, shape, config.d_model, config)

    def __call__(
        self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
    ) -> Float[Array, "*N D"]:
        """Return x plus the vectors of its positions."""
        return x + self.embedding[...][positions].astype(x.dtype)


def learned_position(
    config: ModelConfig, length: int, *, rngs: nnx.Rngs
) -> LearnedPosition | None:
    """Return learned positions, or None where the config has rotary ones."""
    if config.rotates:
        return None
    return LearnedPosition(config, length, rngs=rngs)


class TypeEmbedding(nnx.Module):
    """A learned vector for each type of token, added to the embeddings."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.token_types, config.d_model)
        self.embedding = init_weight(rngs, shape, config.d_model, config)

    def __call__(
        self, x: Float[Array, "*N D"], types: Int[Array, "*N"] | None
    ) -> Float[Array, "*N D"]:
        """Return x plus the vectors of its types; None: all are of type 0."""
        table = self.embedding[...].astype(x.dtype)
        return x + (_expand(table[0], x.ndim) if types is None else table[types])


class TokenEmbedding(nnx.Module):
    """Vectors of tokens, and of positions and types where these are learned."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.dtype = config.compute_dtype
        self.embedding = init_weight(rngs, shape, config.d_model, config)
        self.position = learned_position(config, config.max_seq_len, rngs=rngs)
        types = config.token_types
        self.token_type = TypeEmbedding(config, rngs=rngs) if types else None
        self.norm = Norm(config) if config.embed_norm else None

    def __call__(
        self,
        tokens: Int[Array, "*N"],
        positions: Int[Array, "*N"],
        types: Int[Array, "*N"] | None = None,
    ) -> Float[Array, "*N D"]:
        """Return the embeddings in the compute dtype."""
        x = self.embedding[...][tokens].astype(self.dtype)
        if self.token_type is not None:
            x = self.token_type(x, types)
        if self.position is not None:
            x = self.position(x, positions)
        return x if self.norm is None else self.norm(x)


class PatchEmbedding(nnx.Module):
    """Square patches of an image, one token each (Dosovitskiy et al. 2020, ViT)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.side, self.dtype = config.image_patch, config.compute_dtype
        width = config.image_channels * config.image_patch**2
        shape = (width, config.d_model)
        self.weight = init_weight(rngs, shape, width, config)
        self.bias = nnx.Param(jnp.zeros(config.d_model, config.param_dtype))
        make = lambda: init_weight(rngs, shape[1:], config.d_model, config)
        self.class_token = make() if config.class_token else None
        self.position = learned_position(config, config.num_image_tokens, rngs=rngs)

    def __call__(self, images: Float[Array, "B Hi Wi Ci"]) -> Float[Array, "B T D"]:
        """Return one token per patch, row by row; before them the class token's."""
        batch, height, width, channels = images.shape
        side = self.side
        rows, columns = height // side, width // side
        x = images.reshape(batch, rows, side, columns, side, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = project(x.astype(self.dtype), self.weight[...], self.bias[...])
        if self.class_token is not None:
            first = _expand(self.class_token[...].astype(x.dtype), x.ndim)
            first = jnp.broadcast_to(first, (batch, 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        if self.position is None:
            return x
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        return self.position(x, positions)


class Head(nnx.Module):
    """Linear map to the vocabulary or, with a bias, to classes; logits in float32."""

    def __init__(
        self, config: ModelConfig, num_outputs: int, use_bias: bool, *, rngs: nnx.Rngs
    ):
        shape = (config.d_model, num_outputs)
        self.weight = init_weight(rngs, shape, config.d_model, config)
        self.bias = init_bias((num_outputs,), config, use=use_bias)

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Return float32 logits."""
        bias = None if self.bias is None else self.bias[...]
        return output_logits(x, self.weight[...], bias)


def output_logits(
    x: Float[Array, "*N D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None = None,
) -> Float[Array, "*N V"]:
    """Return x times weight, accumulated in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.dot(x, weight.astype(x.dtype), preferred_element_type=dtype)
    if bias is None:
        return out
    return out + bias.astype(dtype).reshape((1,) * (out.ndim - 1) + (-1,))


def mean_pool(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """Return the mean over the tokens that are not padding."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if segments is None:
        return jnp.mean(x32, axis=1).astype(x.dtype)
    valid = (segments != 0)[..., None].astype(x32.dtype)
    total = jnp.sum(x32 * valid, axis=1)
    return (total / jnp.maximum(jnp.sum(valid, axis=1), 1.0)).astype(x.dtype)
