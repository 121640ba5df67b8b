"""SwiGLU of rows that hold both sides, times a factor of each row.

In plain JAX, and on NVIDIA GPUs in one pass over the rows each way: XLA's backward pass
reads the rows once for the factors' gradient and once for their own, while a program
there holds whole rows' sums as it writes their gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.varying import vary_together

AREA = 2048  # entries of each side that a program takes at a time
BLOCK = 1024  # columns of them, at most
RUN = 128  # columns a block must have at least, unless rows have fewer
WARPS = 4


def call_shape(rows: Float[Array, "M O"]) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    return {
        "rows": rows.shape[0],
        "width": rows.shape[1] // 2,
        "dtype": rows.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "rows", "M O")
    checks.floats(given, "factors", "M")
    checks.backend(given)


@checks.checked(_settle)
def swiglu(
    rows: Float[Array, "M O"],
    factors: Float[Array, " R"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Return silu(gate) * up * factor of rows, each F of up, then F of gate: O = 2F.

    SwiGLU of Shazeer 2020, equation 6, between its products. It is computed in float32
    or wider and rounded once, and so is its gradient, which is made from rows and
    factors alone: no activations are kept.

    Args:
      rows: both projections of each row.
      factors: one number of each row, such as the gate of its expert.
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: an odd width, another number of factors, unknown or unfit backend.
    """
    if rows.shape[1] % 2:
        raise ConfigError(
            f"rows are {rows.shape[1]} wide; up and gate side by side need an even "
            "width"
        )
    if factors.shape != rows.shape[:1]:
        raise ConfigError(
            f"{factors.shape[0]} factors for {rows.shape[0]} rows; each row needs one"
        )
    factors = factors.astype(accumulator_dtype(rows.dtype))
    rows, factors = vary_together(rows, factors)
    shape = call_shape(rows)
    return dispatch("swiglu", BACKENDS, implementation, rows, factors, shape=shape)


@jax.custom_vjp
def _plain_swiglu(
    rows: Float[Array, "M O"], factors: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """Return it by plain JAX, computed in the factors' dtype."""
    up, gate = jnp.split(rows.astype(factors.dtype), 2, axis=-1)
    return (jax.nn.silu(gate) * up * factors[:, None]).astype(rows.dtype)


def _plain_swiglu_fwd(rows, factors):
    return _plain_swiglu(rows, factors), (rows, factors)


def _plain_swiglu_bwd(saved, grad):
    rows, factors = saved
    up, gate = jnp.split(rows.astype(factors.dtype), 2, axis=-1)
    grad = grad.astype(factors.dtype)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    scaled = grad * factors[:, None]
    d_rows = jnp.concatenate([scaled * silu, scaled * up * slope], axis=-1)
    return d_rows.astype(rows.dtype), jnp.sum(grad * silu * up, axis=-1)


_plain_swiglu.defvjp(_plain_swiglu_fwd, _plain_swiglu_bwd)


def _on_triton(
    rows: Float[Array, "M O"], factors: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """Return it by kernels of NVIDIA GPUs.

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
    from uoe_jax.ops import swiglu_kernels

    count, width = rows.shape[0], rows.shape[1] // 2
    return nvidia.launch(
        swiglu_kernels.forward,
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
    from uoe_jax.ops import swiglu_kernels

    return nvidia.launch(
        swiglu_kernels.backward,
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


# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"xla": _plain_swiglu, "triton": _on_triton}
