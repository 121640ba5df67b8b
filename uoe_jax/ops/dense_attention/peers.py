"""Attention by other libraries where they are installed: used where tables say so."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops.dense_attention.call import Call


def tokamax(call: Call) -> Float[Array, "B T N H"]:
    """Return tokamax's attention (its fastest kernel), or say why it can't serve."""
    library = _load("tokamax", call)
    return library.dot_product_attention(
        call.q,
        call.k,
        call.v,
        scale=call.scale,
        is_causal=call.mask.causal,
        implementation="mosaic",
    )


def linear_attention(call: Call) -> Float[Array, "B T N H"]:
    """Return jax-linear-attention's softmax attention, or say why it can't serve.

    Its backward pass adds dq in no fixed order.
    """
    library = _load("jla.ops.mosaic_gpu.attention", call)
    if not call.mask.causal:
        raise NotImplementedError("it is causal only")
    reason = library.supported(call.q, call.k, call.v)
    if reason:
        raise NotImplementedError(reason)
    return _under_jit(library)(call.q, call.k, call.v, call.scale)


@functools.cache
def _under_jit(library: Any) -> Any:
    """Return jax-linear-attention's function under jit: layers share its kernels."""
    run = functools.partial(library.flash_attention, backward="fused")
    return jax.jit(lambda q, k, v, scale: run(q, k, v, scale=scale), static_argnums=3)


def _load(module: str, call: Call) -> Any:
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(
            f"it needs an NVIDIA GPU, not {jax.default_backend()}"
        )
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"it takes bfloat16 or float16, not {call.q.dtype}")
    given = call.segments, call.mask.window, call.sink
    if any(option is not None for option in given):
        raise NotImplementedError("it takes no segments, windows or sinks")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"it isn't installed: {error}") from None
