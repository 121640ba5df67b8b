"""Products of bfloat16 with float32 matrices, to float32 precision on matrix units.

A float32 number is the sum of three bfloat16 numbers. So a product of float32 precision
is one of bfloat16 with the three pieces side by side, several times as fast as a
float32 product where matrix units are made for bfloat16 (NVIDIA GPUs, TPUs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32

from uoe_jax.varying import vary_together

PIECES = 3  # of 8 bits each: all 24 of a float32 number


def split(x: Float32[Array, "*N"], count: int = PIECES) -> list[BFloat16[Array, "*N"]]:
    """Return bfloat16 arrays, largest first, whose sum is `x` (to 8 bits each)."""
    pieces = []
    for _ in range(count):
        # Not a cast and back, which compilers may leave out.
        high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        pieces.append(high.astype(jnp.bfloat16))
        x = x - high
    return pieces


def split_matmul(
    x: BFloat16[Array, "*N D"], w: Float32[Array, "D E"]
) -> Float32[Array, "*N E"]:
    """Return `x @ w` as if `x` were float32, added in float32.

    So is the gradient of `w`; that of `x`, which is bfloat16, is to 16 bits before it
    is rounded.
    """
    flat, w = vary_together(x.reshape(-1, x.shape[-1]), w)
    return _matmul(flat, w).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _matmul(x, w):
    return _sum_pieces(_dot(x, jnp.concatenate(split(w), axis=1)))


def _matmul_fwd(x, w):
    return _matmul(x, w), (x, w)


def _matmul_bwd(saved, grad):
    x, w = saved
    dw = _sum_pieces(_dot(x.T, jnp.concatenate(split(grad), axis=1)))
    (g1, g2), (w1, w2) = split(grad, 2), split(w, 2)
    left, right = (jnp.concatenate(a, axis=1) for a in ((g1, g2, g1), (w1, w1, w2)))
    return _dot(left, right.T, x.dtype), dw


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _dot(a: Array, b: Array, dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.dot(a, b, preferred_element_type=dtype)


def _sum_pieces(products: Float[Array, "N PE"]) -> Float[Array, "N E"]:
    large, middle, small = jnp.split(products, PIECES, axis=1)
    return large + (middle + small)
