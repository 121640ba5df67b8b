"""A causal depthwise convolution of what attention and its router read.

    y[t] = x[t] + sum over j < size of weight[j] * x[t - j]

Each channel for itself, inside a document (Allen-Zhu 2025, Canon layers; So et al.
2021, Primer). Weights start at 0: a model starts as the one without it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.cache import Slot
from uoe_jax.model.context import Context, document_span
from uoe_jax.partition.collectives import Parallel

_NO_DOCUMENT = -1  # before the first token of a sample


class Convolution(nnx.Module):
    """Adds to each token the weighted tokens up to it, `size` of them."""

    def __init__(self, config: ModelConfig):
        shape = (config.convolution, config.d_model)
        self.weight = nnx.Param(jnp.zeros(shape, config.param_dtype))

    @property
    def before(self) -> int:
        """Tokens before its own that a token reads."""
        return self.weight.shape[-2] - 1

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B T D"]:
        """Return the tokens with those before them in their document mixed in."""
        segments, length = context.segments, x.shape[1]
        parallel = context.parallel
        if parallel is not None and parallel.has("sequence"):
            x, segments = _with_halo(x, segments, self.before, parallel)
        first = document_span(x.shape[:2], segments, True)[0]
        index = jnp.arange(x.shape[1])[None]
        sources = []
        for back in range(self.before + 1):
            moved = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]]
            inside = (index - back >= first)[..., None]
            sources.append(jnp.where(inside, moved, jnp.zeros_like(moved)))
        return self._mix(x, sources)[:, x.shape[1] - length :]

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return one token a row, mixed, and its slot, which holds those before it."""
        stored = slot.state("convolution")["tokens"]
        tokens = jnp.concatenate([stored.astype(x.dtype), x[:, None]], axis=1)
        slot = slot.remember("convolution", {"tokens": tokens[:, 1:]})
        return self._mix(x, [tokens[:, -1 - j] for j in range(self.before + 1)]), slot

    def _mix(self, x: Array, sources: list[Array]) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide)
        for weight, source in zip(self.weight[...].astype(wide), sources, strict=True):
            y = y + source.astype(wide) * weight.reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(x.dtype)


def _with_halo(
    x: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    before: int,
    parallel: Parallel,
) -> tuple[Float[Array, "B T2 D"], Int[Array, "B T2"]]:
    """Return this device's tokens and documents behind the last of the device before.

    Of a sample's first tokens nothing is before: what stands there is no document.
    """
    if segments is None:
        segments = (
            jnp.zeros(x.shape[:2], jnp.int32) + jax.lax.axis_index("sequence") * 0
        )
    size = parallel.size("sequence")
    step = [(i, i + 1) for i in range(size - 1)]
    send = lambda a: jax.lax.ppermute(a[:, -before:], "sequence", step)
    first = jax.lax.axis_index("sequence") == 0
    documents = jnp.where(first, _NO_DOCUMENT, send(segments))
    joined = jnp.concatenate([send(x), x], axis=1)
    return joined, jnp.concatenate([documents, segments], axis=1)


def last_tokens(
    x: Float[Array, "B T D"], lengths: Int[Array, " B"], before: int
) -> Float[Array, "B R D"]:
    """Return what prompts of `lengths` tokens leave for the token that comes next."""
    token = lengths[:, None] - before + jnp.arange(before)[None]
    found = jnp.take_along_axis(x, jnp.maximum(token, 0)[..., None], axis=1)
    return jnp.where((token >= 0)[..., None], found, jnp.zeros_like(found))
