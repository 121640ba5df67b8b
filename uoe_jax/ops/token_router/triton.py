"""Norm, scores, picks and gates of single tokens in one kernel, on NVIDIA GPUs.

A program routes a row: its scores are read by nobody else, and the order of so few is
found by comparing all pairs.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops import nvidia

MOST_EXPERTS = 128  # whose pairs a program compares
WIDEST = 16384
AREA = 8192  # weights taken at a time
WARPS = 4


def route(x: Float[Array, "B D"], norm: Any, router: Any) -> tuple[Array, ...]:
    """Return norm(x), the picked experts, their gates, and the gates of all experts.

    Raises:
      NotImplementedError: no fit device, package or dtype; too many experts or inputs.
    """
    nvidia.require(x.dtype)
    width, experts = router.weight.shape
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"{experts} experts; it takes {MOST_EXPERTS}")
    if width > WIDEST:
        raise NotImplementedError(f"inputs are {width} wide; it takes {WIDEST}")
    return tuple(_route(x, norm, router))


def _route(x, norm, router):
    from uoe_jax.ops.token_router import triton_kernels

    batch, width = x.shape
    experts, shared = router.weight.shape[1], router.shared
    block = max(16, 1 << (experts - 1).bit_length())
    whole = max(16, 1 << (width - 1).bit_length())
    chosen = shared + router.top_k
    return nvidia.launch(
        triton_kernels.route,
        x,
        norm.scale,
        router.weight,
        router.bias,
        out_shape=[
            (x.shape, x.dtype),
            ((batch, chosen), jnp.int32),
            ((batch, chosen), jnp.float32),
            ((batch, shared + experts), jnp.float32),
        ],
        grid=batch,
        num_warps=WARPS,
        num_stages=1,
        small=True,
        D=width,
        DD=whole,
        BD=min(whole, max(16, AREA // block)),
        E=experts,
        EE=max(block, 1 << max(shared - 1, 0).bit_length()),
        S=shared,
        K=router.top_k,
        RULE=router.rule,
        AFFINE=router.sigmoid_bias,
        EPS=norm.eps,
    )
