"""Attention by other libraries where they are installed: used where tables say so."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def tokamax(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    segments: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return tokamax's attention (its fastest kernel), or say why it can't serve."""
    library = _load("tokamax", q, segments, window)
    return library.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="mosaic"
    )


def linear_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    segments: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return jax-linear-attention's softmax attention, or say why it can't serve.

    Its backward pass adds dq in no fixed order.
    """
    library = _load("jla.ops.mosaic_gpu.attention", q, segments, window)
    if not causal:
        raise NotImplementedError("it is causal only")
    reason = library.supported(q, k, v)
    if reason:
        raise NotImplementedError(reason)
    return _under_jit(library)(q, k, v, scale)


@functools.cache
def _under_jit(library: Any) -> Any:
    """Return jax-linear-attention's function under jit: layers share its kernels."""
    run = functools.partial(library.flash_attention, backward="fused")
    return jax.jit(lambda q, k, v, scale: run(q, k, v, scale=scale), static_argnums=3)


def _load(
    module: str, q: jax.Array, segments: jax.Array | None, window: int | None
) -> Any:
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(
            f"it needs an NVIDIA GPU, not {jax.default_backend()}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"it takes bfloat16 or float16, not {q.dtype}")
    if segments is not None or window is not None:
        raise NotImplementedError("it takes no segments or windows")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"it isn't installed: {error}") from None
