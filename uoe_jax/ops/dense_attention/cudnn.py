"""Attention by cuDNN's fused kernels: whole sequences in half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops.dense_attention.call import Call


def dense_attention(call: Call) -> Float[Array, "B T N H"]:
    """Return `jax.nn.dot_product_attention` on cuDNN, or say why it can't serve."""
    q, (causal, window) = call.q, call.mask
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(
            f"it needs an NVIDIA GPU, not {jax.default_backend()}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"it takes bfloat16 or float16, not {q.dtype}")
    if call.segments is not None:
        raise NotImplementedError("it takes no segments")
    if call.sink is not None:
        raise NotImplementedError("it takes no sink")
    if q.shape[3] % 8 or q.shape[3] > 128:
        raise NotImplementedError(
            f"head width {q.shape[3]}; it takes multiples of 8 up to 128"
        )
    if window is not None and not causal:
        raise NotImplementedError("it takes windows only with causal=True")
    return jax.nn.dot_product_attention(
        q,
        call.k,
        call.v,
        scale=call.scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
