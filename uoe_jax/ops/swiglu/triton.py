"""SwiGLU in one pass over the rows each way, on NVIDIA GPUs.

XLA's backward pass reads the rows once for the factors' gradient and once for their
own. Here a program holds whole rows' sums while it writes their gradient.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Float32

from uoe_jax.ops import nvidia

AREA = 2048  # entries of each side that a program takes at a time
BLOCK = 1024  # columns of them, at most
RUN = 128  # columns a block must have at least, unless rows have fewer
WARPS = 4


def swiglu(
    rows: Float[Array, "M O"], factors: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """Return silu(gate) * up * factor of rows.

    Raises:
      NotImplementedError: no fit device, package or dtype, or an empty array.
    """
    nvidia.require(rows.dtype)
    if 0 in rows.shape:
        raise NotImplementedError("it takes no empty arrays")
    return _swiglu(rows, factors)


@jax.custom_vjp
def _swiglu(rows, factors):
    return forward(rows, factors)


def _swiglu_fwd(rows, factors):
    return _swiglu(rows, factors), (rows, factors)


def _swiglu_bwd(saved, grad):
    return tuple(backward(*saved, grad))


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@jax.jit
def forward(
    rows: Float[Array, "M O"], factors: Float32[Array, " M"]
) -> Float[Array, "M F"]:
    """Return the activations of rows."""
    from uoe_jax.ops.swiglu import triton_kernels

    count, width = rows.shape[0], rows.shape[1] // 2
    return nvidia.launch(
        triton_kernels.forward,
        rows,
        factors,
        out_shape=((count, width), rows.dtype),
        **_constants(count, width),
    )


@jax.jit
def backward(
    rows: Float[Array, "M O"], factors: Float32[Array, " M"], grad: Float[Array, "M F"]
) -> list[Array]:
    """Return the gradients of rows and of factors."""
    from uoe_jax.ops.swiglu import triton_kernels

    return nvidia.launch(
        triton_kernels.backward,
        rows,
        factors,
        grad,
        out_shape=[(rows.shape, rows.dtype), (factors.shape, factors.dtype)],
        **_constants(*grad.shape),
    )


def columns(width: int) -> int:
    """Return how many columns a program takes at a time of each side.

    A power of two that divides the width if it has one large enough, else one that
    isn't much larger, or BLOCK.
    """
    divisor = width & -width
    if divisor < RUN:
        divisor = max(16, 1 << (width - 1).bit_length())
    return min(divisor, BLOCK)


def _constants(count, width):
    block = columns(width)
    rows = AREA // block
    return {
        "grid": -(-count // rows),
        "num_warps": WARPS,
        "num_stages": 1,
        "M": count,
        "F": width,
        "ROWS": rows,
        "BLOCK": block,
    }
