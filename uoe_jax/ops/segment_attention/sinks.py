"""A sink: a logit in a softmax's denominator that no value goes with.

gpt-oss (OpenAI 2025) learns one a head. Kernels don't know of it: what they read is
scaled by the share of the denominator that isn't the sink's, which their logsumexp
tells.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uoe_jax.ops.numerics import accumulator_dtype


def beside_sink(
    out: Float[Array, "*N H"],
    lse: Float[Array, "*N"],
    sink: Float[Array, ...],
    real: Bool[Array, ...] | None = None,
) -> Float[Array, "*N H"]:
    """Return attention with a sink, of that without one and its scores' logsumexp.

    `sink` and `real` are broadcast to the logsumexp's shape. Rows that aren't `real`
    read nothing; whatever their numbers are reaches none.
    """
    sink = sink.astype(accumulator_dtype(sink.dtype))
    sink = jnp.broadcast_to(sink, lse.shape)
    if real is not None:
        real = jnp.broadcast_to(real, lse.shape)
        lse, sink = (jnp.where(real, a, 0) for a in (lse, sink))
    share = jax.nn.sigmoid(lse - sink)
    if real is not None:
        share = jnp.where(real, share, 0)
    return (out * share[..., None]).astype(out.dtype)
