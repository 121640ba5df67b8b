"""Products whose operands are rounded to eight bits on the way forward: float8_e4m3fn.

Operands are scaled to that type's range, each by what it holds at the moment ("current
scaling": Micikevicius et al. 2022, FP8 Formats for Deep Learning, section 4), so there
is no history to keep. Scales are powers of two. Multiplying by them is exact, so an
operand is e4m3 numbers times a scale without another rounding, in any float type of at
least 8 exponent bits. Gradients are of the operands as they came, in their own dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from uoe_jax.varying import vary_together

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # 1.75 * 2**8; from half of a step above it on, numbers are nan
# "none": operands as they are. "tensor": a scale for each array, or each expert's
# weight. "rows": one for each row of x and each column of a weight.
SCALES = ("none", "tensor", "rows")

# Part of jit's cache key, so that a function traced for both is traced twice.
_SCALES = jax.make_user_context(default_value="none")


@contextlib.contextmanager
def float8_products(scales: str) -> Iterator[None]:
    """Round the operands of projections and grouped products while tracing."""
    with _SCALES(scales):
        yield


def chosen_scales() -> str:
    """Return what `float8_products` was given, "none" outside of it."""
    return _SCALES.value


def to_float8(
    x: Float[Array, "*N"], axes: Sequence[int]
) -> tuple[Float8e4m3fn[Array, "*N"], Float32[Array, "*M"]]:
    """Return x over its scale, rounded to nearest even, and the scales.

    A scale is for all entries along `axes`, which have one entry in it: the least power
    of two that brings the largest finite one to at most 448; 1 for zeros. Entries that
    aren't finite become nan, and no other changes for them.
    """
    wide = x.astype(jnp.float32)
    finite = jnp.isfinite(wide)
    sizes = jnp.where(finite, jnp.abs(wide), 0)
    most = jnp.max(sizes, axis=axes, keepdims=True, initial=0)  # of no entries, too
    exponent = _exponent(most)
    numbers = jnp.where(finite, _round(wide * _power(-exponent)), jnp.nan)
    return numbers.astype(E4M3), _power(exponent)


def as_they_lie(numbers: Float8e4m3fn[Array, "*N"]) -> Float8e4m3fn[Array, "*N"]:
    """Return numbers that are transposed next, laid out as their axes are.

    XLA would transpose what they are made of instead: on GPUs, float32 copies of a
    whole weight. So it transposes bytes, while it makes them.
    """
    return with_layout_constraint(numbers, Layout(tuple(range(numbers.ndim))))


def rounded(x: Float[Array, "*N"], axes: Sequence[int]) -> Float[Array, "*N"]:
    """Return x as its eight bits have it: numbers times their scale, in x's dtype."""
    numbers, scale = to_float8(x, axes)
    return numbers.astype(x.dtype) * scale.astype(x.dtype)


def _round(x: Float32[Array, "*N"]) -> Float32[Array, "*N"]:
    """Return numbers of up to 448 rounded to those of e4m3, ties to even.

    Not by the cast, which XLA leaves out on GPUs where a cast back follows it.
    """
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=3)
    # Below 2**-6 all steps are 2**-9.
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 512) / 512, normal)


def _exponent(most: Float32[Array, "*N"]) -> Array:
    """Return the least k of -126 to 120 with most <= 448 * 2**k; 0 for zero."""
    bits = jax.lax.bitcast_convert_type(most, jnp.int32)
    # most = 1.m * 2**(e - 127), and 448 = 1.75 * 2**8.
    above = (bits & 0x7FFFFF) > 0x600000
    k = (bits >> 23) - 127 - 8 + above.astype(jnp.int32)
    return jnp.where(most > 0, jnp.maximum(k, -126), 0)


def _power(exponent: Array) -> Float32[Array, "*N"]:
    """Return 2**exponent from its bits: no function that rounds."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def matmul(x: Float[Array, "*N I"], w: Float[Array, "I O"]) -> Float[Array, "*N O"]:
    """Return x @ w; within `float8_products` with both rounded to eight bits.

    The gradients are those of x and w as they came.
    """
    scales = chosen_scales()
    if scales == "none":
        return jnp.dot(x, w)
    flat, w = vary_together(x.reshape(-1, x.shape[-1]), w)
    return _matmul(scales, flat, w).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(scales, x, w):
    if scales == "tensor":
        # As XLA finds it: a product of numbers times scales goes to cuBLASLt, which
        # takes one scale an operand.
        return jnp.dot(rounded(x, (0, 1)), rounded(w, (0, 1)))
    (a, rows), (b, columns) = to_float8(x, (1,)), to_float8(w, (0,))
    # cuBLASLt takes b with its columns side by side.
    out = jnp.dot(a, as_they_lie(b), preferred_element_type=x.dtype)
    return out * (rows * columns).astype(x.dtype)


def _matmul_fwd(scales, x, w):
    return _matmul(scales, x, w), (x, w)


def _matmul_bwd(scales, saved, grad):
    x, w = saved
    dx = jnp.dot(grad, w.T)
    return dx, jnp.dot(x.T, grad)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
